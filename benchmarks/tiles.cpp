// Tiles and folds as gradients/tiles.py and projections/folding.py have them, in C++; see native_cpp.py.
#include <algorithm>
#include <cstdint>
#include <cstring>

constexpr long LANES = BYTES / 4, WIDTH = 2 * LANES, ROWS = LANES == 8 ? 6 : 8, POSITIONS = 128, BLOCK = 2048;
constexpr bool BROAD = LANES != 8;
typedef float Vector __attribute__((vector_size(BYTES), aligned(4)));

// begin tile
template <long rows, long vectors>
static void add_tile(const float* left, long row_step, long left_step, const float* right, long right_step,
                     const int64_t* meets, const int64_t* met, long count, float* out, long out_step, bool fresh) {
    Vector sums[rows][vectors];
    for (long row = 0; row < rows; row++)
        for (long part = 0; part < vectors; part++)
            sums[row][part] = fresh ? Vector{} : *(const Vector*)(out + row * out_step + part * LANES);
    for (long pair = 0; pair < count; pair++) {
        const float *factors = left + meets[pair] * left_step, *columns = right + met[pair] * right_step;
        for (long row = 0; row < rows; row++)
            for (long part = 0; part < vectors; part++)
                sums[row][part] += factors[row * row_step] * *(const Vector*)(columns + part * LANES);
    }
    for (long row = 0; row < rows; row++)
        for (long part = 0; part < vectors; part++) *(Vector*)(out + row * out_step + part * LANES) = sums[row][part];
}
// end tile

// begin products
extern "C" void add_products(const float* left, long step, long inner, const float* right, long next_right,
                             const int64_t* meets, const int64_t* met, const int64_t* counts, long most, float* out,
                             long o, long kernel, long i) {
    long out_step = kernel * i, full = o / ROWS * ROWS, few = full + (o - full) / 4 * 4;
    for (long begin = 0; begin < most; begin += POSITIONS)
        for (long column = 0; column < i; column += WIDTH)
            for (long place = 0; place < kernel; place++) {
                long count = std::min(POSITIONS, long(counts[place]) - begin);
                auto tiles = [&](auto tile, long first, long last, long height) {
                    for (long row = first; row < last; row += height)
                        tile(left + row * step, step, inner, right + column, next_right, meets + place * most + begin,
                             met + place * most + begin, count, out + row * out_step + place * i + column, out_step,
                             begin == 0);
                };
                if (i - column < WIDTH) {
                    tiles(add_tile<ROWS, 1>, 0, full, ROWS);
                    tiles(add_tile<1, 1>, full, o, 1);
                    continue;
                }
                tiles(add_tile<ROWS, 2>, 0, full, ROWS);
                if (!BROAD || i % (2 * WIDTH) != 0)
                    tiles(add_tile<4, 2>, full, few, 4);
                else if (column % (2 * WIDTH) == 0)
                    tiles(add_tile<4, 4>, full, few, 4);
                tiles(add_tile<1, 2>, few, o, 1);
            }
}
// end products

// begin fold
extern "C" double fold(float* accumulator, long k, const float* entries, long size, const int8_t* signs,
                       const int64_t* shifts, float scale) {
    double total = 0;
    for (long block = 0; block * k < size; block++)
        for (long begin = block * k, last = std::min(size, begin + k); begin < last; begin += BLOCK) {
            long count = std::min(BLOCK, last - begin);
            float *__restrict sums = accumulator + shifts[block] + begin - block * k, square = 0;
            const float* given = entries + begin;
            const int8_t* sign = signs + begin;
            for (long place = 0; place < count; place++) {
                sums[place] += scale * sign[place] * given[place];
                square += given[place] * given[place];
            }
            total += square;
        }
    return total;
}
// end fold

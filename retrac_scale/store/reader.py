"""Reading a SketchStore: only committed blocks are ever seen."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from zarr.errors import GroupNotFoundError

from retrac_scale.store.encoding import Float32, decode
from retrac_scale.store.errors import IncompleteStoreError
from retrac_scale.store.schema import ATTRIBUTE, FORMAT_VERSION, Url, blocks, read, read_ids, zarr_location

ALL = slice(None)


class SketchStore:
    """Sketches `[c, n, t, k]` of per-sample gradients, with their norms, losses and timesteps.

    Get one from `open_store`, `sketch` or `write_store`. Arrays come back as NumPy, decoded, for all samples or a
    slice of them; `root` is the zarr group, for those who read the arrays themselves.
    """

    def __init__(self, root: zarr.Group, url: Url) -> None:
        self.root = root
        self.url = url
        self.meta: dict[str, Any] = dict(root.attrs[ATTRIBUTE])  # type: ignore[arg-type]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the sketches are a function of: projection, parameters, checkpoints, scheduler, measure, timesteps."""
        return dict(self.meta["fingerprint"])

    @property
    def checkpoints(self) -> list[str]:
        """Checkpoint names, in the order they were given."""
        return list(self.meta["checkpoints"])

    @property
    def weights(self) -> dict[str, float]:
        """Checkpoint weights w_c."""
        return dict(self.meta["checkpoints"])

    @property
    def ids(self) -> npt.NDArray[Any]:
        """Sample ids `[n]`, int64 or str."""
        return read_ids(self.root)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n, t, k)."""
        n, t, k = self.meta["shape"]
        return n, t, k

    @property
    def blocks(self) -> list[slice]:
        """Sample ranges of the blocks, the units of writing and reading."""
        return blocks(self.shape[0], self.meta["block_samples"])

    def committed(self, checkpoint: str) -> npt.NDArray[np.bool_]:
        """Which blocks of a checkpoint are written, bool `[blocks]`."""
        done: npt.NDArray[np.bool_] = np.equal(read(self.root, f"{self._group(checkpoint)}/committed"), 1)
        return done

    @property
    def is_complete(self) -> bool:
        """Whether every block of every checkpoint is committed."""
        return all(self.committed(name).all() for name in self.checkpoints)

    def sketches(self, checkpoint: str, samples: slice = ALL) -> Float32:
        """Raw sketches, float32 `[n, t, k]`; their inner products estimate those of the gradients."""
        return decode(self._read(checkpoint, "sketch", samples), self._read(checkpoint, "scale", samples))

    def norms(self, checkpoint: str, samples: slice = ALL) -> Float32:
        """L2 norms of the full gradients (or their estimates, see the projection), float32 `[n, t]`."""
        return self._read(checkpoint, "norm", samples)

    def losses(self, checkpoint: str, samples: slice = ALL) -> Float32:
        """The differentiated values, float32 `[n, t]`."""
        return self._read(checkpoint, "loss", samples)

    def timesteps(self, checkpoint: str, samples: slice = ALL) -> npt.NDArray[np.int64]:
        """Diffusion timesteps, int64 `[n, t]`."""
        return self._read(checkpoint, "timestep", samples)

    def has(self, quantity: str) -> bool:
        """Whether the store carries 'loss' or 'timestep', which `write_store` may leave out."""
        return f"{self._group(self.checkpoints[0])}/{quantity}" in self.root

    def _group(self, checkpoint: str) -> str:
        if checkpoint not in self.checkpoints:
            raise KeyError(f"the store has no checkpoint {checkpoint!r}; it has {self.checkpoints}.")
        return checkpoint

    def _read(self, checkpoint: str, quantity: str, samples: slice) -> npt.NDArray[Any]:
        group = self._group(checkpoint)
        if f"{group}/{quantity}" not in self.root:
            raise ValueError(f"the store was written without {quantity}; give it to write_store.")
        start, stop, step = samples.indices(self.shape[0])
        size = self.meta["block_samples"]
        done = self.committed(checkpoint)
        for block in range(start // size, -(-stop // size)):
            if not done[block]:
                raise IncompleteStoreError(
                    f"checkpoint {checkpoint!r}, samples {block * size} .. {self.blocks[block].stop - 1} "
                    "are not written yet; run the same sketch(...) again, it computes only what is missing."
                )
        return read(self.root, f"{group}/{quantity}", slice(start, stop, step))

    def __repr__(self) -> str:
        n, t, k = self.shape
        return f"SketchStore({self.url!r}: {len(self.checkpoints)} checkpoints, {n} samples, {t} timesteps, k = {k})"


def open_root(url: Url, what: str, mode: Literal["r", "r+"] = "r") -> zarr.Group:
    """Open the zarr group of a store or an index, checking that it is a finished one of a known version."""
    try:
        root = zarr.open_group(zarr_location(url), mode=mode)
    except (FileNotFoundError, GroupNotFoundError) as error:
        raise FileNotFoundError(f"there is no {what} at {url}.") from error
    meta = root.attrs.get(ATTRIBUTE)
    if not isinstance(meta, dict) or meta.get("what") != what:
        raise ValueError(f"{url} is a zarr group but no {what}.")
    if meta["format"] > FORMAT_VERSION:
        raise ValueError(
            f"{url} has format version {meta['format']}, this release reads up to {FORMAT_VERSION}; "
            "update retrac_scale."
        )
    return root


def open_store(url: Url, *, mode: Literal["r", "r+"] = "r") -> SketchStore:
    """Open an existing SketchStore, for reading unless mode is "r+".

    Args:
        url: a path or an fsspec URL.
        mode: "r+" is for workers that write blocks.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: what is there is no sketch store, or of a newer format.
    """
    return SketchStore(open_root(url, "sketch store", mode), url)

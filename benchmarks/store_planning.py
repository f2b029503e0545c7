"""The planner's prediction for the demo's sketching against the run itself: python -m benchmarks.store_planning"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from diffusers import DDPMScheduler

from retrac_scale import DiffusionTask, EvenlySpaced, demo, open_store, planner, sketch
from retrac_scale.projections import CountSketch

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=len(demo.KEPT_EPOCHS))
    checkpoints = parser.parse_args().checkpoints
    scans, projection = demo.load_scans(), CountSketch(demo.DIM)
    task = DiffusionTask(demo.build_model(), DDPMScheduler(num_train_timesteps=1000))
    item = planner.example_item(task)
    rate = planner.measure_sketching(task, item, projection)
    pairs = len(scans) * checkpoints
    predicted = rate.seconds(pairs)
    size = planner.store_size(len(scans), 1, checkpoints, demo.DIM, columns=scans.columns)
    states = {f"epoch-{epoch:02d}": demo.build_model().state_dict() for epoch in demo.KEPT_EPOCHS[:checkpoints]}
    with tempfile.TemporaryDirectory() as folder:
        out, started = Path(folder) / "sketches.zarr", time.perf_counter()
        sketch(task, scans, out, checkpoints=states, timesteps=EvenlySpaced(1), projection=projection, progress=False)
        took = time.perf_counter() - started
        files = [file for file in out.rglob("*") if file.is_file()]
        arrays = sum(file.stat().st_size for file in files if file.name != "zarr.json")
        store = open_store(out)
        known = {"weights": store.weights, "fingerprint": store.fingerprint, "plan": store.plan}
        exact = planner.store_size(len(scans), 1, checkpoints, demo.DIM, columns=scans.columns, **known)
        metadata = sum(file.stat().st_size for file in files if file.name == "zarr.json")
    print(f"time: predicted {predicted:.1f} s, took {took:.1f} s: {predicted / took - 1:+.0%}  ({pairs} pairs)")
    print(f"arrays: predicted {size.array_bytes} bytes, written {arrays}")
    print(f"metadata: predicted {exact.metadata_bytes} bytes given the run's fingerprint, written {metadata}")
    print(f"metadata: predicted about {size.metadata_bytes} bytes without it")

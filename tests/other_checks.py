"""The outcome of the checks of other scripts: `max_abs passed` or `max_abs failed`, and the same for `same`, on stdout.

max_abs  max abs error < 1e-2 against the CPU, as in the log of a published adaptation of the default model
same     torch._dynamo.utils.same with an fp64 reference, and the tolerance of PyTorch's own benchmarks of timm models

The model and the images are those of stage 4: `other_checks.py --model NAME --weights random`.
"""

import copy
import sys
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])

import with_test_models  # noqa: F401

import validate_npu as v

v.import_packages()
options = v.parse_arguments(None)
device = v.find_device(options.device)

import torch
from torch._dynamo.utils import same

model, _ = v.load_model(options)
images = v.draw_inputs(4, v.timm.data.resolve_model_data_config(model)["input_size"], options.seed)
with torch.no_grad():
    exact = copy.deepcopy(model).double()(images.double())
    reference = model(images)
    try:
        found = model.to(device)(images.to(device)).cpu()
    except RuntimeError:  # a device that fails is noticed by any script
        found = torch.full_like(reference, torch.nan)
passed = {
    "max_abs": bool((found - reference).abs().max() < 1e-2),
    "same": same(reference, found, fp64_ref=exact, tol=1e-3, log_error=lambda *_: None),
}
for name, outcome in passed.items():
    print(name, "passed" if outcome else "failed")

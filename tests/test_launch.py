"""Device and precision; Ctrl-C, memory and bugs. Refusals and stops: the tests of whole programs."""

import pytest
import torch

from training.launch import REFUSED, STOPPED, choose_device, run_program, set_precision
from utils.errors import UserError


@pytest.mark.parametrize("error, status, words", [
    (MemoryError(), REFUSED, "raise opt.accumulate"),
    (KeyboardInterrupt(), STOPPED, "Interrupted; run the same command to resume.")])
def test_errors_become_a_message_and_a_status_but_bugs_keep_their_traceback(error, status, words, capsys):
    def run(error):
        raise error

    assert run_program(run, error) == status and words in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        run_program(run, ZeroDivisionError())


def test_devices_and_precisions():
    cpu = choose_device("cpu")
    for name in ("cuda:99", "cpux"):
        with pytest.raises(UserError, match=f"opt.device = '{name}'"):
            choose_device(name)
    dtypes = [set_precision(precision, cpu) for precision in ("fp32", "bf16", "fp16")]
    with pytest.raises(UserError, match="opt.precision = \"tf32\": cpu does not have it"):
        set_precision("tf32", cpu)
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    set_precision("fp32", cpu)
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert dtypes == [torch.float32, torch.bfloat16, torch.float16] and set_precision("auto", cpu) in dtypes[:2]

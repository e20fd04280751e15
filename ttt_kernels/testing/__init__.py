"""What users need to test a kernel of their own against this package's yardstick.

    from ttt_kernels import testing
    data = testing.make_inputs(batch=1, tokens=300, d=64, f=192, dtype=torch.bfloat16)
    report = testing.check_scan(my_scan, data, chunk_size=64, step_size=0.3)
    assert report.within_budget, report
    assert not testing.violations(my_scan)

The yardstick is the declared precision contract, not "roughly equal": see `budget`.
"""

from ttt_kernels.testing.budget import BudgetReport, check_scan, error_ratio
from ttt_kernels.testing.contract import contract_scan, exact_scan
from ttt_kernels.testing.inputs import ScanInputs, make_inputs
from ttt_kernels.testing.properties import violations

__all__ = [
    "BudgetReport",
    "ScanInputs",
    "check_scan",
    "contract_scan",
    "error_ratio",
    "exact_scan",
    "make_inputs",
    "violations",
]

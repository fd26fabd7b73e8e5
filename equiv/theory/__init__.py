"""The theory as software: claims that run, on any model, and say how they know.

>>> import equiv
>>> equiv.theory.run([3])[3].verdict.value
'holds'
"""

from equiv.theory.findings import Findings as Findings
from equiv.theory.findings import Judged as Judged
from equiv.theory.norms import Norm as Norm
from equiv.theory.registry import claim as claim
from equiv.theory.registry import from_file as from_file
from equiv.theory.registry import shipped as shipped
from equiv.theory.running import run as run
from equiv.theory.setting import Setting as Setting
from equiv.theory.values import AsWritten as AsWritten
from equiv.theory.values import Claim as Claim
from equiv.theory.values import ClaimResult as ClaimResult
from equiv.theory.values import Verdict as Verdict

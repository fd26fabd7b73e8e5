"""How far can moving a model's activations stand in for updating its weights?

>>> import torch, equiv
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
>>> update = equiv.Update.random(model, relative_norm=0.01, seed=0)
>>> equiv.check(model, update).holds
True
"""

from equiv import kernels as kernels
from equiv import theory as theory
from equiv.behaviour.calibrating import calibrate as calibrate
from equiv.behaviour.evaluating import Evaluation as Evaluation
from equiv.behaviour.evaluating import evaluate as evaluate
from equiv.behaviour.training import fit_behaviour as fit_behaviour
from equiv.checking import check as check
from equiv.designing.design import design as design
from equiv.designing.values import Design as Design
from equiv.errors import ArgumentError as ArgumentError
from equiv.errors import EndpointError as EndpointError
from equiv.errors import EquivError as EquivError
from equiv.errors import FileFormatError as FileFormatError
from equiv.errors import ForwardModeError as ForwardModeError
from equiv.errors import InputsError as InputsError
from equiv.errors import MissingExtraError as MissingExtraError
from equiv.errors import NoExactFormError as NoExactFormError
from equiv.errors import NotConvergedWarning as NotConvergedWarning
from equiv.errors import NotEquivalentError as NotEquivalentError
from equiv.errors import NotSameError as NotSameError
from equiv.errors import OutputsError as OutputsError
from equiv.errors import SiteError as SiteError
from equiv.errors import UnsupportedModelError as UnsupportedModelError
from equiv.errors import UpdateError as UpdateError
from equiv.errors import UpdateMismatchError as UpdateMismatchError
from equiv.gate.comparing import assert_same as assert_same
from equiv.gate.comparing import compare as compare
from equiv.gate.diagnosing import diagnose as diagnose
from equiv.gate.endpoint import Completions as Completions
from equiv.gate.sides import TopK as TopK
from equiv.gate.values import Agreement as Agreement
from equiv.gate.values import Diagnosis as Diagnosis
from equiv.model.sites import Site as Site
from equiv.model.text_files import read_texts as read_texts
from equiv.report.report import Report as Report
from equiv.shift.activations import Shift as Shift
from equiv.shift.activations import shifts as shifts
from equiv.steering import formats as formats
from equiv.steering.applying.apply import steer as steer
from equiv.steering.applying.sweeping import sweep as sweep
from equiv.steering.files.saving import load as load
from equiv.steering.files.saving import save as save
from equiv.steering.fits.fitting import fit as fit
from equiv.steering.fits.sequential import fit_sequential as fit_sequential
from equiv.steering.forms.affine import Affine as Affine
from equiv.steering.forms.custom import Custom as Custom
from equiv.steering.forms.form import Steering as Steering
from equiv.steering.forms.heads import Heads as Heads
from equiv.steering.forms.loreft import LoReFT as LoReFT
from equiv.steering.forms.mlp import LowRankMLP as LowRankMLP
from equiv.steering.forms.oracle import Offset as Offset
from equiv.steering.forms.oracle import Overwrite as Overwrite
from equiv.steering.forms.steering_set import SteeringSet as SteeringSet
from equiv.steering.forms.vector import Vector as Vector
from equiv.steering.jacobian.downstream import fit_downstream as fit_downstream
from equiv.steering.jacobian.reaching import reach as reach
from equiv.steering.jacobian.unknowns import Reach as Reach
from equiv.steering.weights.from_weights import to_steering as to_steering
from equiv.steering.weights.to_weights import to_weights as to_weights
from equiv.steering.weights.weight_edit import WeightEdit as WeightEdit
from equiv.targets import fit_steering as fit_steering
from equiv.update.update import Update as Update

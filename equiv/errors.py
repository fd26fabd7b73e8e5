"""The library's errors: each says what was expected, what came, and what to do.

A wrong call fails at the door with one of these; a failed numerical contract is not
an error but a verdict in the report, and becomes `NotEquivalentError` only on request.
"""


class EquivError(Exception):
    """Base of every error that this library raises on purpose: catch it for all."""


class UpdateError(EquivError, ValueError):
    """The update cannot be used: empty, not finite, not floating, or ambiguous.

    Look at the named entry of the update; `equiv.Update.between(base, tuned)` makes
    an update that is right by construction.
    """


class UpdateMismatchError(UpdateError):
    """The update does not fit the model: unknown names, other shapes or devices.

    Compare the names in the message with `model.named_parameters()`.
    """


class InputsError(EquivError, ValueError):
    """The inputs cannot be fed to the model or leave nothing to measure.

    Raised for token ids out of range, a wrong width, batches with every token masked,
    and texts without a tokenizer.
    """


class UnsupportedModelError(EquivError, TypeError):
    """The model cannot be measured: quantised, on the meta device, or of no known form.

    The message names the obstacle and the nearest way around it.
    """


class SiteError(EquivError, ValueError):
    """A layer or site was asked for that the model does not have.

    The message lists those it has.
    """


class ArgumentError(EquivError, ValueError):
    """An argument has a value outside its set; the message lists the valid ones."""


class ForwardModeError(EquivError, RuntimeError):
    """An operation of the model has no forward-mode derivative in PyTorch."""


class NoExactFormError(EquivError, ValueError):
    """Steering that is no weight edit, or an update that is no steering, exactly.

    The message says which steer or parameter it is, and why.
    """


class FileFormatError(EquivError, ValueError):
    """A file is not what it was taken for, is damaged, or would have to run code."""


class MissingExtraError(EquivError, ImportError):
    """An optional package is needed for this call; the message says how to get it."""


class NotEquivalentError(EquivError, AssertionError):
    """`Report.assert_holds` found a layer and site where the equivalence fails.

    One line per failing site, with its order, remainder and radius.
    """


class OutputsError(EquivError, ValueError):
    """What a side of a comparison answers cannot be compared.

    Raised for different vocabularies, outputs of the wrong shape or not finite, and two
    lists of likeliest tokens that name different tokens.
    """


class EndpointError(EquivError, RuntimeError):
    """A completions endpoint did not answer as it should; nothing was kept of it.

    The message says which request failed, how, and what the server said.
    """


class NotSameError(EquivError, AssertionError):
    """`equiv.assert_same` found a difference beyond the tolerances.

    One line: what differs most, where, by how much, and what it looks like.
    """


class NotConvergedWarning(UserWarning):
    """An iterative fit stopped before it came to an end; its best result is kept.

    Give it fewer parameters, or a better start.
    """

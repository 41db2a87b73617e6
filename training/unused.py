"""Warnings about code that is never called: a trainer class not passed to `main`, a hook whose name has a typo."""

import difflib
import inspect
import sys

SIMILAR = 0.72  # `loss` and `loss_fn` are just similar enough


def unused(given: type | None, default: type) -> list[str]:
    """Warnings for a script that calls `main(trainer_class=given)`; without a class, `default` is trained.

    A method gets a warning if `default` has a method of a similar name but not of this name, and no method calls it.
    """
    kinds = [*vars(sys.modules['__main__']).values()] if given is None else given.__mro__
    own = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, default.__mro__[1])]
    own = [kind for kind in own if not issubclass(default, kind)]
    if given is None:
        return [f'{kind.__name__} is not trained. Write main(trainer_class={kind.__name__}).' for kind in own]
    methods = {name: value for kind in own for name, value in vars(kind).items() if inspect.isfunction(value)}
    called = {name for method in methods.values() for name in method.__code__.co_names}
    warnings = []
    for name in methods:
        near = difflib.get_close_matches(name, [hook for hook in dir(default) if hook[0] != '_'], 1, SIMILAR)
        if near and not hasattr(default, name) and name not in called:
            warnings.append(f'{given.__name__}.{name} is not called. Is it meant to be {near[0]}?')
    return warnings

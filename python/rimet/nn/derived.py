"""Classes made at run time that take the place of a module's own class."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

__all__ = ["Derived", "derive", "original_class"]


class Derived:
    """Base of classes made by :func:`derive`.

    No import finds them, so a pickle or copy names the original class and how to derive from it.
    """

    _original_cls: ClassVar[type[nn.Module]]
    _maker: ClassVar[Callable[[type[nn.Module]], type[nn.Module]]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls = type(self)
        own = _own_method(cls._original_cls, "__reduce_ex__", "__reduce__")
        if own is None:
            getstate = getattr(self, "__getstate__", None)  # of object, from Python 3.11 on
            state = self.__dict__ if getstate is None else getstate()
            return _made_anew, (cls._maker, cls._original_cls), state
        make, args, *rest = own(self, protocol) if own.__name__ == "__reduce_ex__" else own(self)
        return _made_by_its_own, (cls._maker, make, args, self.__dict__), *rest

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        cls = type(self)
        own = _own_method(cls._original_cls, "__deepcopy__")
        if own is not None:
            return _completed(own(self, memo), cls._maker, self.__dict__, memo)
        make, args, state = self.__reduce_ex__(4)[:3]
        result = make(*args)
        memo[id(self)] = result
        result.__setstate__(copy.deepcopy(state, memo))
        return result


def _own_method(cls: type, *names: str) -> Callable[..., Any] | None:
    """The first of these methods that a class defines otherwise than ``object``."""
    for name in names:
        method = getattr(cls, name, None)
        if method is not None and method is not getattr(object, name, None):
            found: Callable[..., Any] = method
            return found
    return None


def _made_anew(maker: Callable[[type], Any], original_cls: type) -> Any:
    cls = maker(original_cls)
    return cls.__new__(cls)


def _made_by_its_own(
    maker: Callable[[type], type],
    make: Callable[..., Any],
    args: tuple[Any, ...],
    attributes: Mapping[str, Any],
) -> Any:
    return _completed(make(*args), maker, attributes, None)


def _completed(
    module: Any,
    maker: Callable[[type], type],
    attributes: Mapping[str, Any],
    memo: dict[int, Any] | None,
) -> Any:
    """What the original class made of a copy or pickle, with the derived class and what that
    class knows nothing of.
    """

    def copied(value: Any) -> Any:
        return value if memo is None else copy.deepcopy(value, memo)

    if not isinstance(module, Derived):
        module.__class__ = maker(type(module))
    for name, value in attributes.items():
        if name == "_modules":
            for child, submodule in value.items():
                if child not in module._modules:
                    module.add_module(child, copied(submodule))
        elif name not in module.__dict__:
            module.__dict__[name] = copied(value)
    return module


_made: weakref.WeakValueDictionary[tuple[Any, type], type] = weakref.WeakValueDictionary()


def derive(
    maker: Callable[[type[nn.Module]], type[nn.Module]],
    original_cls: type[nn.Module],
    bases: tuple[type, ...],
    namespace: Callable[[], dict[str, Any]],
    name: str | None = None,
) -> Any:
    """The class that ``maker`` derives from ``original_cls``, made at the first call.

    :param maker: function, to be found by import, that gives this class for the original one
    :param bases: bases of the class
    :param namespace: gives its attributes
    :param name: its name; by default that of the original
    """
    cls = _made.get((maker, original_cls))
    if cls is None:
        attributes = {
            "__module__": original_cls.__module__,
            "__qualname__": name or original_cls.__qualname__,
            "__doc__": original_cls.__doc__,
            "_original_cls": original_cls,
            "_maker": staticmethod(maker),
            **namespace(),
        }
        metaclass: Any = max((type(base) for base in bases), key=lambda meta: len(meta.mro(meta)))
        cls = metaclass(name or original_cls.__name__, bases, attributes)
        _made[maker, original_cls] = cls
    return cls


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before :func:`derive`."""
    cls = type(module)
    while issubclass(cls, Derived):
        cls = cls._original_cls
    return cls

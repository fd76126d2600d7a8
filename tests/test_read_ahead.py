"""Tensors on their way to the device: in order, bounded in bytes, and on the device that was asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.converters.read_ahead import ReadAhead


class Numbered:
    """A `TensorSource` of float32 tensors [size] that hold their number, and that says which have been read."""

    def __init__(self, *sizes, broken=None):
        self.sizes, self.broken, self.have_read = sizes, broken, []

    def names(self):
        return [str(number) for number in range(len(self.sizes))]

    def shape(self, name):
        return (self.sizes[int(name)],)

    def dtype(self, name):
        return np.dtype(np.float32)

    def read(self, name):
        if int(name) == self.broken:
            raise OSError(f"tensor {name} cannot be read")
        self.have_read.append(int(name))
        return np.full(self.shape(name), int(name), np.float32)


def test_tensors_come_in_their_order():
    source = Numbered(*[8] * 20)
    with ReadAhead(source, source.names(), in_flight=3 * 32) as tensors:
        for number in range(20):
            tensor = tensors.next()
            assert tensor.shape == (8,) and (tensor == number).all()
            tensors.used(tensor)


@pytest.mark.parametrize(("in_flight", "ahead"), [(32, 1), (100, 3), (320, 10)])
def test_no_more_is_read_than_has_room(in_flight, ahead):
    """Of 32 bytes each. What is not used up counts, whether it was read or handed out."""
    source = Numbered(*[8] * 30)
    with ReadAhead(source, source.names(), in_flight=in_flight) as tensors:
        for number in range(30):
            tensor = tensors.next()
            for future in [future for _, future in tensors._coming]:
                future.result()  # let it read all that it may
            assert max(source.have_read) < number + ahead
            tensors.used(tensor)
    assert source.have_read == list(range(30))


def test_a_larger_tensor_goes_by_itself():
    source = Numbered(8, 1000, 8, 8)
    with ReadAhead(source, source.names(), in_flight=64) as tensors:
        for number, size in enumerate(source.sizes):
            tensor = tensors.next()
            if size == 1000:
                assert source.have_read == [0, 1]
            assert tensor.shape == (size,) and (tensor == number).all()
            tensors.used(tensor)


class Busy:
    """A result that is ready when it is waited for. A program with a callback would not do: a CPU runs it at once."""

    waited = False

    def is_ready(self):
        return self.waited

    def block_until_ready(self):
        self.waited = True
        return self


def test_it_waits_for_what_is_in_use_only_if_it_has_nothing_to_give():
    source, first = Numbered(8, 8, 8), Busy()
    with ReadAhead(source, source.names(), in_flight=64) as tensors:
        assert (tensors.next() == 0).all()
        tensors.used(first)
        assert (tensors.next() == 1).all()  # has been read, and there is no room for the third
        assert not first.waited and source.have_read == [0, 1]
        tensors.used(jnp.zeros(()))
        assert (tensors.next() == 2).all()
        assert first.waited


def test_an_error_of_a_read_comes_out_and_ends_the_reading():
    source = Numbered(*[8] * 10, broken=2)
    with pytest.raises(OSError, match="tensor 2 cannot be read"), ReadAhead(source, source.names(), 64) as tensors:
        while True:
            tensors.used(tensors.next())
    assert max(source.have_read) <= 3


def test_tensors_lie_on_the_default_device_of_whoever_asks():
    source = Numbered(8, 8)
    with jax.default_device(jax.devices()[3]), ReadAhead(source, source.names()) as tensors:
        assert tensors.next().devices() == {jax.devices()[3]}

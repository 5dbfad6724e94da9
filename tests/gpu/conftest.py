"""What these tests share with those of the program."""

from tests.training.conftest import data as data

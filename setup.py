"""What pyproject.toml cannot say: the adapters that ship stand beside the package, and inside it in the wheel."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["jax_ccm*"]), "jax_ccm.adapters"],
    package_dir={"jax_ccm.adapters": "adapters"},
)

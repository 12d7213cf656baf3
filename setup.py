"""The folders at the top are one import package: `nas/` is `hypernas`, the others are packages in it."""

from setuptools import find_packages, setup

FOLDERS = {
    "hypernas": "nas",
    "hypernas.kernels": "kernels",
    "hypernas.search_spaces": "search_spaces",
    "hypernas.dashboards": "dashboards",
}

setup(
    package_dir=FOLDERS,
    packages=[*FOLDERS, *(f"{name}.{inner}" for name, folder in FOLDERS.items() for inner in find_packages(folder))],
)

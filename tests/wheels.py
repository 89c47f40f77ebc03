"""A wheel of a source tree, built and unpacked as pip does it."""

import subprocess
import sys
import zipfile


def unpacked(source, site):
    """Build the wheel of the project in `source` and unpack it into `site`."""
    wheels = site.with_name("wheels")
    wheels.mkdir()
    build = f"import setuptools.build_meta as b; print(b.build_wheel({str(wheels)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)

#!/usr/bin/env bash
# Makes what install.sh installs without a network: one archive with every wheel, the units, the scripts and the docs.
#
#   bundle.sh cpu [FOLDER]    fedimpres-VERSION-linux-x86_64-cpu.tar.gz in FOLDER (dist)
#   bundle.sh cuda-manifest   deploy/cuda-requirements.txt: every wheel of the CUDA bundle, by version and SHA-256
#   bundle.sh cuda [FOLDER]   fedimpres-VERSION-linux-x86_64-cuda.tar.gz, of exactly these wheels (several GB)
#   bundle.sh wheel FOLDER    this checkout's own wheel alone
#
# PYTHON names the interpreter (with pip); the bundle installs with the same minor version. pip's own settings say where
# wheels come from. On a machine whose index gives CUDA builds, the CPU bundle needs
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
set -euo pipefail
umask 022

HERE=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
TOP=$(dirname "$HERE")
PYTHON=${PYTHON:-python3}
MANIFEST=$HERE/cuda-requirements.txt
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$TOP" log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH

die() {
    printf '%s\n' "bundle.sh: error: $*" >&2
    exit 1
}

pip() { "$PYTHON" -m pip --quiet --disable-pip-version-check "$@"; }

# From a copy: building in place would leave folders behind, and take up what an earlier build left.
own_wheel() { # FOLDER
    local package
    mkdir "$WORK/source"
    cp "$TOP"/{pyproject.toml,README.md,LICENSE} "$WORK/source"
    for package in "$TOP"/fed*/__init__.py; do
        cp -R "$(dirname "$package")" "$WORK/source"
    done
    find "$WORK/source" -name __pycache__ -prune -exec rm -r {} +
    pip wheel --no-deps --wheel-dir "$1" "$WORK/source"
}

# One line a wheel in FOLDER: NAME==VERSION --hash=sha256:DIGEST.
lock() { # FOLDER
    local path name version
    for path in "$1"/*.whl; do
        IFS=- read -r name version _ < <(basename "$path")
        printf '%s==%s --hash=sha256:%s\n' "$name" "$version" "$(sha256sum "$path" | cut -d ' ' -f 1)"
    done
}

pack() { # what lies in $BUNDLE/wheels
    local name archive
    name=$(basename "$BUNDLE") archive=$FOLDER/$name.tar.gz
    lock "$BUNDLE/wheels" >"$BUNDLE/requirements.txt"
    echo "$VERSION" >"$BUNDLE/VERSION"
    "$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])' >"$BUNDLE/PYTHON"
    cp -R "$HERE" "$TOP/docs" "$BUNDLE"
    cp "$TOP"/{README.md,CHANGELOG.md,LICENSE} "$BUNDLE"
    rm -rf "$BUNDLE/docs/results" "$BUNDLE/docs/results.json" "$BUNDLE/deploy/bundle.sh"
    ln -s deploy/install.sh "$BUNDLE/install.sh"
    (cd "$BUNDLE" && find . -type f ! -path ./SHA256SUMS -print0 | sort -z | xargs -0 sha256sum >SHA256SUMS)
    mkdir -p "$FOLDER"
    # Level 0: wheels are compressed already.
    tar -C "$WORK" --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner -cf - "$name" |
        "$PYTHON" -c 'import gzip, shutil, sys
with gzip.GzipFile("", "wb", 0, sys.stdout.buffer, 0) as file: shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)' >"$archive.part"
    mv "$archive.part" "$archive"
    (cd "$FOLDER" && sha256sum "$name.tar.gz" | tee "$name.tar.gz.sha256")
    echo "$archive ($(du -h "$archive" | cut -f 1))"
}

bundle_cpu() {
    own_wheel "$BUNDLE/wheels"
    pip wheel --wheel-dir "$BUNDLE/wheels" --constraint "$TOP/constraints.txt" "$BUNDLE"/wheels/fedimpres-*.whl
    [ -z "$(find "$BUNDLE/wheels" -iname 'nvidia*')" ] ||
        die "pip found a CUDA build of PyTorch; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu has the other"
    pack
}

bundle_cuda() {
    [ -e "$MANIFEST" ] || die "there is no $MANIFEST: bundle.sh cuda-manifest"
    own_wheel "$BUNDLE/wheels"
    pip download --no-deps --require-hashes --only-binary :all: --dest "$BUNDLE/wheels" --requirement "$MANIFEST"
    pack
}

cuda_manifest() {
    own_wheel "$WORK"
    pip install --dry-run --ignore-installed --only-binary :all: --report "$WORK/report.json" \
        --constraint "$TOP/constraints.txt" "$WORK"/fedimpres-*.whl
    "$PYTHON" - "$WORK/report.json" "$MANIFEST" <<'END'
import json, sys
report, manifest = sys.argv[1:]
with open(report, encoding="utf-8") as file:
    found = [item for item in json.load(file)["install"] if item["metadata"]["name"] != "fedimpres"]
lines = sorted(
    (f'{item["metadata"]["name"]}=={item["metadata"]["version"]} '
     f'--hash=sha256:{item["download_info"]["archive_info"]["hashes"]["sha256"]}' for item in found),
    key=str.lower,
)
if not any(line.startswith("nvidia-") for line in lines):
    sys.exit("bundle.sh: error: pip found a CPU build of PyTorch; use an index that has CUDA builds, as PyPI")
python = "%d.%d" % sys.version_info[:2]
with open(manifest, "w", encoding="utf-8") as file:
    file.write(f"# Every wheel of the CUDA bundle (Linux x86_64, CPython {python}). Made by `make bundle-cuda-manifest`.\n")
    file.writelines(f"{line}\n" for line in lines)
print(f"{manifest}: {len(lines)} wheels")
END
}

WORK=$(mktemp -d "${TMPDIR:-/tmp}/fedimpres-bundle.XXXXXX")
trap 'rm -rf "$WORK"' EXIT
VERSION=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$TOP/pyproject.toml")
BUNDLE=$WORK/fedimpres-$VERSION-linux-x86_64-${1:-}
FOLDER=$(realpath -m -- "${2:-$TOP/dist}")
case ${1:-} in
cpu) bundle_cpu ;;
cuda) bundle_cuda ;;
cuda-manifest) cuda_manifest ;;
wheel) own_wheel "$FOLDER" ;;
*) die "what to make? cpu, cuda, cuda-manifest, or wheel FOLDER" ;;
esac

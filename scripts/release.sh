#!/usr/bin/env bash
# Build the wheel and the image of a release from its tag, into dist/; both hold its bill of materials (CycloneDX).
#
#   scripts/release.sh [TAG]      TAG: by default the tag of the present commit
#
# Refuses a tree with changes, a tag that is not v and the version of pyproject.toml, a tag of another commit, and a version
# that CHANGELOG.md has no section for. The image is built where a container engine answers. PYTHON names the interpreter
# (default: .venv/bin/python); it needs pip and the build system of pyproject.toml.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}

refuse() {
    echo "release: $1" >&2
    exit 1
}

[ -x "$(command -v "$python")" ] || refuse "there is no $python; run: make .venv/.dev"
[ -z "$(git status --porcelain)" ] || refuse "the tree has changes; commit or remove them: $(git status --short | head -3 | xargs)"

version=$("$python" -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])')
tag=${1:-$(git tag --points-at HEAD | head -1)}
[ -n "$tag" ] || refuse "the present commit has no tag; run: git tag -a v$version -m v$version"
[ "$tag" = "v$version" ] || refuse "the tag $tag does not match the version $version in pyproject.toml"
commit=$(git rev-parse --quiet --verify "refs/tags/$tag^{commit}") || refuse "there is no tag $tag"
[ "$commit" = "$(git rev-parse HEAD)" ] || refuse "the tag $tag is not the present commit; run: git checkout $tag"
grep -q "^## \[$version\] - [0-9]" CHANGELOG.md || refuse "CHANGELOG.md has no section '## [$version] - DATE'"

# only what the tag holds gets into the wheel and the image
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT
git archive "$tag" | tar -x -C "$source"

"$python" -m cyclonedx_py requirements "$source/requirements.lock" --pyproject "$source/pyproject.toml" \
    --output-reproducible --output-format JSON --output-file "$source/app/sbom.cdx.json" ||
    refuse "the bill of materials cannot be made; run: make .venv/.dev"

rm -rf dist
mkdir dist
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist "$source"
wheel=dist/deepextension-$version-py3-none-any.whl
[ -f "$wheel" ] || refuse "pip built $(ls dist), not $wheel"
cp "$source/app/sbom.cdx.json" dist/
(cd dist && sha256sum -- *.whl sbom.cdx.json > SHA256SUMS)
echo "wheel: $wheel ($(du -k "$wheel" | cut -f1) KiB)"

if docker info > /dev/null 2>&1; then
    docker build --quiet --tag "deepextension:$version" "$source"
    echo "image: deepextension:$version"
else
    echo "image: not built, because no container engine answers; run scripts/release.sh where 'docker info' works"
fi

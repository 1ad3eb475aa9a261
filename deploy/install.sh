#!/usr/bin/env bash
# Installs, upgrades, rolls back and removes fedimpres as systemd services. `install.sh --help` says how.
#
# It lies in a bundle (wheels beside it, no network needed), in a checkout (pip fetches the pinned versions), and in every
# installed release. A release is a folder of its own with its own units: what runs is named by one link, changed in one step.
set -euo pipefail
umask 022

HERE=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
TOP=$(dirname "$HERE")

usage() {
    cat <<'END'
usage: install.sh coordinator|agent      install a role; what is there already is left as it is
       install.sh upgrade                move every role installed here to this release; restart what runs
       install.sh rollback               back to the release before, or to --release NAME; restart what runs
       install.sh uninstall [ROLE]       stop and remove a role, or both; its home below /var/lib stays

options:
  --release NAME     name of the release's folder below /opt/fedimpres/releases (default: the version)
  --python PROGRAM   interpreter to install with
  --gpu              let the service use NVIDIA GPUs
  --purge            with uninstall: remove the home too, with identity, models and audit log
  --root DIR         install below DIR instead of /, for images and tests; starts and stops nothing
END
}

say() { printf '%s\n' "install.sh: $*"; }

die() {
    printf '%s\n' "install.sh: error: $1" >&2
    [ $# -lt 2 ] || printf '%s\n' "hint: $2" >&2
    exit 1
}

main() {
    read_arguments "$@"
    BASE=$ROOT/opt/fedimpres
    check_system
    mkdir -p "$BASE/releases"
    exec 9>"$BASE/.lock"
    flock -n 9 || die "another install.sh is at work in $BASE"
    case $ACTION in
    install) install_role ;;
    upgrade) upgrade ;;
    rollback) rollback ;;
    uninstall) uninstall ;;
    esac
}

read_arguments() {
    ACTION='' ROLE='' RELEASE='' PYTHON='' GPU='' PURGE='' ROOT=''
    while [ $# -gt 0 ]; do
        case $1 in
        -h | --help) usage && exit 0 ;;
        --gpu) GPU=yes ;;
        --purge) PURGE=yes ;;
        --release | --python | --root)
            [ $# -ge 2 ] || wrong_usage "$1 needs a value"
            case $1 in
            --release) RELEASE=$2 ;;
            --python) PYTHON=$2 ;;
            --root) ROOT=$2 ;;
            esac
            shift
            ;;
        coordinator | agent)
            [ -z "$ROLE" ] || wrong_usage "one role at a time"
            ROLE=$1
            ACTION=${ACTION:-install}
            ;;
        upgrade | rollback | uninstall)
            [ -z "$ACTION" ] || wrong_usage "one action at a time"
            ACTION=$1
            ;;
        *) wrong_usage "what is $1?" ;;
        esac
        shift
    done
    [ -n "$ACTION" ] || wrong_usage "nothing to do"
    case $ACTION in upgrade | rollback) [ -z "$ROLE" ] || wrong_usage "$ACTION is of all roles" ;; esac
    [ -z "$PURGE" ] || [ "$ACTION" = uninstall ] || wrong_usage "--purge goes with uninstall"
    [[ -z $RELEASE || $RELEASE =~ ^[A-Za-z0-9][A-Za-z0-9.+_-]*$ ]] || wrong_usage "$RELEASE is no name of a release"
    if [ -n "$ROOT" ]; then
        ROOT=$(realpath -m -- "$ROOT")
        [ "$ROOT" != / ] || ROOT=''
    fi
}

wrong_usage() {
    printf '%s\n' "install.sh: $1" >&2
    usage >&2
    exit 2
}

# ---- what is here ------------------------------------------------------------------------------------------------------

check_system() {
    [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || die "$(uname -s) $(uname -m) is not Linux x86_64"
    [ -n "$ROOT" ] || [ "$(id -u)" = 0 ] || die "only root can install services" "sudo $0, or --root DIR for an image"
    local tool
    for tool in systemctl systemd-sysusers systemd-tmpfiles; do
        command -v "$tool" >/dev/null || die "there is no $tool" "fedimpres runs as systemd services"
    done
}

# Whether systemd runs this machine, and it is this machine that is changed.
live() { [ -z "$ROOT" ] && [ -d /run/systemd/system ]; }

unit_of() { case $1 in coordinator) echo fedserver ;; agent) echo fedagent ;; esac; }

installed_roles() {
    local role
    for role in coordinator agent; do
        [ ! -e "$ROOT/etc/systemd/system/$(unit_of "$role").service" ] || echo "$role"
    done
}

# Name of the release that a link (current, previous) leads to; nothing if there is none.
release_at() { [ ! -L "$BASE/$1" ] || basename "$(readlink "$BASE/$1")"; }

# Where this script lies: bundle, checkout or release.
source_kind() {
    if [ -d "$TOP/wheels" ]; then
        echo bundle
    elif [ -e "$TOP/pyproject.toml" ]; then
        echo checkout
    else
        echo release
    fi
}

name_release() {
    [ -z "$RELEASE" ] || return 0
    case $(source_kind) in
    bundle) RELEASE=$(cat "$TOP/VERSION") ;;
    checkout) RELEASE=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$TOP/pyproject.toml") ;;
    release) RELEASE=$(basename "$TOP") ;;
    esac
    [ -n "$RELEASE" ] || die "can't tell which version lies in $TOP"
}

# ---- a release ---------------------------------------------------------------------------------------------------------

# Set PYTHON to an interpreter that the services can use.
find_python() {
    local wanted='' candidate why=''
    [ ! -e "$TOP/PYTHON" ] || wanted=$(cat "$TOP/PYTHON")
    local candidates=("python${wanted:-3}" "/usr/bin/python${wanted:-3}" "/usr/local/bin/python${wanted:-3}")
    [ -z "$PYTHON" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        command -v "$candidate" >/dev/null || continue
        if why=$("$candidate" - "$wanted" 2>&1 <<'END'
import os, sys
wanted, found = sys.argv[1], "%d.%d" % sys.version_info[:2]
if sys.version_info < (3, 11):
    sys.exit(f"is Python {found}; 3.11 or newer is needed")
if wanted and wanted != found:
    sys.exit(f"is Python {found}; this bundle is made for {wanted}")
try:
    import ensurepip, venv
except ImportError:
    sys.exit(f"has no venv (on Debian and Ubuntu: apt install python{found}-venv)")
for path in (os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix) + "/"):
    if path.startswith(("/home/", "/root/", "/run/user/")):
        sys.exit(f"lies in {path}, which the services can't see")
END
        ); then
            PYTHON=$(command -v "$candidate")
            return
        fi
        why="$candidate $why"
    done
    die "${why:-no Python was found}" "--python PROGRAM names Python ${wanted:-3.11 or newer} with venv, outside of people's homes"
}

check_bundle() {
    say "checking $(wc -l <"$TOP/SHA256SUMS") files against SHA256SUMS"
    (cd "$TOP" && sha256sum --check --quiet --strict SHA256SUMS) ||
        die "the bundle is damaged; nothing was changed" "copy it again, and compare the archive's own checksum"
    local beside
    beside=$(cd "$TOP" && comm -13 <(cut -c 67- SHA256SUMS | sort) <(find . -type f ! -path ./SHA256SUMS | sort))
    [ -z "$beside" ] || die "in the bundle, but not in SHA256SUMS: $(echo "$beside" | head -n 3 | tr '\n' ' ')" \
        "unpack it into an empty folder"
}

# Make the release's folder, whole or not at all.
build_release() {
    local final=$BASE/releases/$RELEASE kind
    kind=$(source_kind)
    if [ -d "$final" ]; then
        say "release $RELEASE is there already"
        return
    fi
    [ "$kind" != release ] || die "there is no release $RELEASE in $BASE/releases"
    [ "$kind" != bundle ] || check_bundle
    find_python
    say "making release $RELEASE from this $kind with $PYTHON"
    STAGING=$BASE/releases/.making
    trap 'rm -rf "$STAGING"' EXIT
    rm -rf "$STAGING"
    "$PYTHON" -m venv "$STAGING"
    if [ "$kind" = bundle ]; then install_from_bundle; else install_from_checkout; fi
    cp -R "$HERE" "$STAGING/deploy"  # its files are root's, whoever owns these
    if ! "$STAGING/bin/python" -I -m pip --disable-pip-version-check check ||
        ! "$STAGING/bin/python" -I -c 'import torch, fedserver.cli, fedagent.cli, fedctl.app'; then
        die "what was installed does not run on this machine; nothing was changed"
    fi
    # The folder gets its name only now; scripts name the interpreter as it will be called.
    "$STAGING/bin/python" -I - "$STAGING" "/opt/fedimpres/releases/$RELEASE" <<'END'
import pathlib, sys
staging = pathlib.Path(sys.argv[1])
old, new = (text.encode() for text in sys.argv[1:])
for path in (*staging.glob("bin/*"), staging / "pyvenv.cfg"):
    if not path.is_symlink() and path.is_file() and old in (content := path.read_bytes()):
        path.write_bytes(content.replace(old, new))
END
    mv -T "$STAGING" "$final"
}

install_from_bundle() {
    PIP_CONFIG_FILE=/dev/null "$STAGING/bin/python" -I -m pip --isolated install --quiet --disable-pip-version-check \
        --no-index --no-deps --require-hashes --find-links "$TOP/wheels" --requirement "$TOP/requirements.txt"
}

install_from_checkout() {
    mkdir "$STAGING/made"
    PYTHON="$STAGING/bin/python" "$HERE/bundle.sh" wheel "$STAGING/made"
    "$STAGING/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$TOP/constraints.txt" "$STAGING"/made/*.whl
    rm -r "$STAGING/made"
}

link() { # TARGET LINK, in one step
    ln -sfn "$1" "$2.new"
    mv -T "$2.new" "$2"
}

switch_to() {
    local before
    before=$(release_at current)
    [ "$before" != "$1" ] || return 0
    [ -z "$before" ] || link "releases/$before" "$BASE/previous"
    link "releases/$1" "$BASE/current"
    say "current is release $1${before:+ (before: $before)}"
}

# ---- a role ------------------------------------------------------------------------------------------------------------

put_role() {
    local unit from=$BASE/current/deploy etc=$ROOT/etc program
    unit=$(unit_of "$1")
    install -D -m 644 -t "$etc/sysusers.d" "$from/sysusers.d/$unit.conf"
    install -D -m 644 -t "$etc/tmpfiles.d" "$from/tmpfiles.d/$unit.conf"
    install -D -m 644 -t "$etc/systemd/system" "$from/systemd/$unit.service"
    if [ -n "$GPU" ] || [ -e "$etc/systemd/system/$unit.service.d/gpu.conf" ]; then
        install -D -m 644 "$from/systemd/drop-ins/$unit-gpu.conf" "$etc/systemd/system/$unit.service.d/gpu.conf"
    fi
    systemd-sysusers ${ROOT:+"--root=$ROOT"} "$unit.conf"
    systemd-tmpfiles ${ROOT:+"--root=$ROOT"} --create "$unit.conf"
    mkdir -p "$ROOT/usr/local/bin"
    for program in $(programs_of "$1"); do
        if [ -e "$ROOT/usr/local/bin/$program" ] && ! ours "$program"; then
            say "/usr/local/bin/$program is not ours, and stays; ours is /opt/fedimpres/current/bin/$program"
        else
            link "/opt/fedimpres/current/bin/$program" "$ROOT/usr/local/bin/$program"
        fi
    done
}

programs_of() { case $1 in coordinator) echo fedserver fedctl ;; agent) echo fedagent ;; esac; }

ours() { [ "$(readlink "$ROOT/usr/local/bin/$1")" = "/opt/fedimpres/current/bin/$1" ]; }

remove_role() {
    local unit etc=$ROOT/etc program
    unit=$(unit_of "$1")
    if live && [ -e "$etc/systemd/system/$unit.service" ]; then
        systemctl disable --now "$unit.service"
    fi
    rm -f "$etc/systemd/system/$unit.service" "$etc/systemd/system/$unit.service.d/gpu.conf" \
        "$etc/systemd/system/multi-user.target.wants/$unit.service" \
        "$etc/sysusers.d/$unit.conf" "$etc/tmpfiles.d/$unit.conf"
    rmdir "$etc/systemd/system/$unit.service.d" 2>/dev/null || true
    for program in $(programs_of "$1"); do
        ! ours "$program" || rm "$ROOT/usr/local/bin/$program"
    done
    if [ -n "$PURGE" ]; then
        rm -rf "$ROOT/var/lib/${unit:?}"
        say "the $1 is removed, and /var/lib/$unit with it; the user $unit stays, so that its number is not given again"
    else
        say "the $1 is removed; /var/lib/$unit is kept"
    fi
}

reload() { ! live || systemctl daemon-reload; }

restart_running() {
    local unit role
    live || return 0
    for role in $(installed_roles); do
        unit=$(unit_of "$role")
        # What was stopped on purpose stays so; what failed may be why this is done.
        case $(systemctl is-active "$unit.service") in inactive | unknown) continue ;; esac
        systemctl restart "$unit.service" ||
            die "$unit does not come up under release $(release_at current)" \
                "journalctl -u $unit -n 50 says why; $BASE/current/deploy/install.sh rollback goes back"
        say "$unit is up"
    done
}

# ---- the actions -------------------------------------------------------------------------------------------------------

install_role() {
    name_release
    local current
    current=$(release_at current)
    [ -z "$current" ] || [ "$current" = "$RELEASE" ] ||
        die "release $current is current here, this is $RELEASE" "install.sh upgrade first, or run $BASE/current/deploy/install.sh $ROLE"
    build_release
    switch_to "$RELEASE"
    put_role "$ROLE"
    reload
    say "the $ROLE is installed"
    next_steps
}

next_steps() {
    local unit
    unit=$(unit_of "$ROLE")
    [ ! -e "$ROOT/var/lib/$unit/$unit.toml" ] && [ ! -e "$ROOT/var/lib/$unit/credential" ] || return 0
    echo "Next, as root:"
    if [ "$ROLE" = coordinator ]; then
        echo "  runuser -u fedserver -- fedserver init --home /var/lib/fedserver --name NAME --host HOST"
    else
        echo "  runuser -u fedagent -- fedagent enroll --home /var/lib/fedagent --coordinator HOST:8443 --token TOKEN --ca-fingerprint FINGERPRINT"
        echo "  say in /var/lib/fedagent/agent.toml where the images lie; examples: /opt/fedimpres/current/deploy/config"
        echo "  runuser -u fedagent -- fedagent preflight --home /var/lib/fedagent"
    fi
    echo "  systemctl enable --now $unit"
}

upgrade() {
    name_release
    local current
    current=$(release_at current)
    [ -n "$current" ] || die "nothing is installed in $BASE" "install.sh coordinator or install.sh agent"
    [ "$current" != "$RELEASE" ] || say "release $RELEASE is current already; --release NAME installs the same version anew"
    build_release
    move_to "$RELEASE"
    prune
}

rollback() {
    RELEASE=${RELEASE:-$(release_at previous)}
    [ -n "$RELEASE" ] || die "there is no release before this one in $BASE"
    [ -d "$BASE/releases/$RELEASE" ] || die "there is no release $RELEASE in $BASE/releases" "$(echo there is: "$BASE"/releases/*)"
    move_to "$RELEASE"
    say "a database that the newer release has changed is refused by this one: restore the backup of before the upgrade"
}

move_to() {
    local role
    switch_to "$1"
    for role in $(installed_roles); do
        put_role "$role"
    done
    reload
    restart_running
}

# Keep the current release and the one before: each takes more than 1 GB.
prune() {
    local path name
    for path in "$BASE"/releases/*; do
        name=$(basename "$path")
        case $name in "$(release_at current)" | "$(release_at previous)") continue ;; esac
        rm -rf "$path"
        say "release $name is removed"
    done
}

uninstall() {
    local role
    for role in ${ROLE:-coordinator agent}; do
        remove_role "$role"
    done
    reload
    [ -z "$(installed_roles)" ] || return 0
    rm -rf "$BASE"
    say "all releases are removed"
}

main "$@"
exit

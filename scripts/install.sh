#!/usr/bin/env bash
# Installs imager for use on this machine, or removes it again: `make install`, `make uninstall`.
set -euo pipefail

prefix=${PREFIX:-/opt/imager}
command=/usr/local/bin/imager
completion=/usr/share/bash-completion/completions/imager
images=/var/lib/imager/images

say() { echo "$1: ${*:2}"; }
fail() { echo "install: $*" >&2; exit 1; }

install_imager() {
    "$(dirname "$0")/setup.sh" install "$prefix"
    mkdir -p "$(dirname "$command")" "$(dirname "$completion")"
    ln -sfn "$prefix/bin/imager" "$command"
    # Disk images hold every secret of the machine: for root only.
    install -d -m 0700 "$images"
    _IMAGER_COMPLETE=source_bash "$command" >"$completion.new" && mv "$completion.new" "$completion"
    say install "$("$command" --version 2>/dev/null || echo imager) is in $prefix, run as $command"
    say install "images go to $images; shell completion starts in a new shell"
}

uninstall_imager() {
    [[ $(readlink "$command" || true) != "$prefix/bin/imager" ]] || rm "$command"
    rm -f "$completion"
    # Only what is a virtual environment of ours: PREFIX may be mistyped.
    if [[ -e $prefix/pyvenv.cfg && -e $prefix/bin/imager ]]; then
        rm -r "$prefix"
    fi
    say uninstall "done; images stay in $images, settings in /etc/imager"
}

((EUID == 0)) || fail "needs root: run it with sudo"
case ${1:-} in
install) install_imager ;;
uninstall) uninstall_imager ;;
*) fail "usage: install.sh install|uninstall" ;;
esac

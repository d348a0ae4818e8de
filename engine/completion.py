"""Completion scripts for bash and zsh: commands, the options of each, configuration keys, and else file names."""

from collections.abc import Collection, Mapping

SHELLS = "bash", "zsh"
SCRIPT = """\
{first}_fusionreid() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" options words=""
    case "${{COMP_WORDS[1]}}" in
{cases}
        *) options="--help --version" ;;
    esac
    case "$current" in
        -*) words="$options" ;;
        [A-Z]*) words="{keys}" ;;
        *) if [ "$COMP_CWORD" -eq 1 ]; then words="{commands}"; fi ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _fusionreid fusionreid
"""


def script(shell: str, options: Mapping[str, Collection[str]], keys: Collection[str]) -> str:
    """A script for the shell to read; `options` of each command by its name."""
    cases = "\n".join(f'        {name}) options="{" ".join(words)}" ;;' for name, words in options.items())
    first = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return SCRIPT.format(first=first, cases=cases, keys=" ".join(keys), commands=" ".join(options))

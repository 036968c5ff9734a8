"""A `TemplateForm` in the syntax of Go's text/template, with Ollama's variables.

Ollama gives a template `.Messages` (neighbours of one role joined by an empty line), each with `.Role` and `.Content`,
and `.System`, `.Prompt`, `.Tools`, `.Response` beside them; a template that reads `.Messages` is run once over all of
them. What a Modelfile would lose is written as escapes in a string: its parser drops characters that do not print.
"""

from topwork.export.ollama.form import TemplateForm

_ROLES = "this model reads system, user and assistant messages only"
_NO_SYSTEM = "this model's chat template takes no system message"
_SYSTEM_FIRST = "a system message can only stand first"


def go_template(form: TemplateForm) -> str:
    """The TEMPLATE of a Modelfile."""
    assistant = form.assistant
    return (
        f"{_text(form.begin)}"
        "{{ range $i, $message := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        f"{_default(form)}"
        f'{{{{ if eq .Role "system" }}}}{_system(form)}'
        f'{{{{ else if eq .Role "user" }}}}{_user_before(form)}{{{{ .Content }}}}{_text(form.user.behind)}'
        f'{{{{ else if eq .Role "assistant" }}}}{_text(assistant.before)}{{{{ .Content }}}}'
        f"{{{{ if not $last }}}}{_text(assistant.behind)}{{{{ end }}}}"
        f"{{{{ else }}}}{_refusal(_ROLES)}{{{{ end }}}}"
        f'{{{{ if $last }}}}{{{{ if ne .Role "assistant" }}}}{_text(form.prompt)}{{{{ end }}}}{{{{ end }}}}'
        "{{ end }}"
    )


def go_string(text: str) -> str:
    """A string in Go, in ASCII."""
    return '"' + "".join(_escaped(letter) for letter in text) + '"'


def prints(text: str) -> bool:
    """Whether a Modelfile keeps every character of a text."""
    return all(letter.isprintable() or letter in "\n\t" for letter in text)


def _escaped(letter: str) -> str:
    if letter in '"\\':
        return "\\" + letter
    if " " <= letter <= "~":
        return letter
    named = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return named.get(letter) or (f"\\u{ord(letter):04x}" if ord(letter) < 1 << 16 else f"\\U{ord(letter):08x}")


def _text(text: str) -> str:
    """Text outside of an action; as a string in one where it would be read otherwise there."""
    if "{" in text or '"""' in text or not prints(text):
        return f"{{{{ {go_string(text)} }}}}"
    return text


def _refusal(told: str) -> str:
    """A template cannot raise; slicing a text behind its end does, and Ollama's error message then shows the text."""
    return f"{{{{ slice {go_string(told)} 999 }}}}"


def _default(form: TemplateForm) -> str:
    if not form.default:
        return ""
    return f'{{{{ if eq $i 0 }}}}{{{{ if ne .Role "system" }}}}{_text(form.default)}{{{{ end }}}}{{{{ end }}}}'


def _system(form: TemplateForm) -> str:
    if form.system is None:
        return _refusal(_NO_SYSTEM)
    later = "" if form.anywhere else f"{{{{ if gt $i 0 }}}}{_refusal(_SYSTEM_FIRST)}{{{{ end }}}}"
    return f"{later}{_text(form.system.before)}{{{{ .Content }}}}{_text(form.system.behind)}"


def _user_before(form: TemplateForm) -> str:
    """In a joined form the system message has opened the first user turn already."""
    own = _text(form.user.before)
    if form.system is None or not form.joined:
        return own
    opened = '{{ if eq $i 1 }}{{ if ne (index $.Messages 0).Role "system" }}' + own + "{{ end }}"
    return f"{opened}{{{{ else }}}}{own}{{{{ end }}}}"

"""Small chat templates that treat thinking as the large families do."""

R1 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}
{{- '[U]' + m.content }}{% elif m.role == 'assistant' %}{% set said = m.content %}{% if '</think>' in said %}
{%- set said = said.split('</think>')[-1] %}{% endif %}{{- '[A]' + said }}{% for call in m.tool_calls or [] %}
{{- '[C]' + call.function.name + (call.function.arguments | tojson) }}{% endfor %}{{ eos_token }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '[A]OPENING' }}{% endif %}"""
"""Takes thinking out of answers, and opens it when it prompts for one."""

R1_OPENS = R1.replace("OPENING", "<think>\\n")
R1_OLDER = R1.replace("OPENING", "")

NAMED = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.KEY is defined %}
{{- '<think>' + m.KEY + '</think>' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""Writes thinking that it finds under one name."""

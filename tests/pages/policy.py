"""The policy of the tests of the pages: of each kind of group, quota and user one, and names that are markup.

alice   staff               200,000 tokens a day, 50 requests of gpt-4o in six hours
bob     staff and team-x    also a pot, which team-x shares
carol   guests              20 requests an hour
dave    lab                 a shadow quota, and one that counts afterwards
ROGUE   staff               the name is an image that would run a script
"""

from tests.admin import ADMINS
from tests.stage import key_of

# Names that are markup. A page that put one into its HTML would violate its Content-Security-Policy.
ROGUE = "<img src=x onerror=alert(1)>"
ROGUE_MODEL = "<b/onclick=alert(1)>model</b>"
ROGUE_LABEL = "\"><script>alert('label')</script>"
# What the single sign-on in front sends for ROGUE.
IN_FRONT = {"authorization": f"Bearer {key_of('sso')}", "x-forwarded-user": ROGUE}
# The name of a model whose upstream answers with a page of HTML.
FAILING_MODEL = "failing"

_USERS = {"alice": "staff", "bob": "staff, team-x", "carol": "guests", "dave": "lab"}

POLICY = f"""
help: "https://llm.example/usage"
timezone: Europe/Berlin
models:
  gpt-4o: {{upstream: simulated, max_output_tokens: 1000}}
  gpt-4o-mini: {{upstream: simulated, max_output_tokens: 1000}}
  fast: {{upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100}}
  "{ROGUE_MODEL}": {{upstream: simulated, model: gpt-4o-mini, max_output_tokens: 100}}
  {FAILING_MODEL}: {{upstream: simulated, model: gpt-4o-mini+html, max_output_tokens: 100}}
groups:
  everyone: {{quotas: {{calls: {{requests: 5000, per: day}}}}}}
  staff:
    quotas:
      daily: {{tokens: 200k, per: day}}
      frontier: {{models: [gpt-4o], requests: 50, input_tokens: 400k, output_tokens: 50k, per: 6h}}
  team-x: {{quotas: {{pot: {{tokens: 1M, per: month, shared: true}}}}}}
  guests: {{quotas: {{hourly: {{requests: 20, per: hour}}}}}}
  lab:
    quotas:
      weekly: {{tokens: 1M, per: week, enforce: after}}
      planned: {{tokens: 1k, per: day, enforce: shadow}}
users:
{"".join(f'  {user}: {{groups: [{groups}], keys: ["{key_of(user)}"]}}' + chr(10) for user, groups in _USERS.items())}\
identity:
  headers:
    - {{name: sso, key: {key_of("sso")}, from: [127.0.0.0/8], user: X-Forwarded-User, unmapped: staff}}
{ADMINS}"""

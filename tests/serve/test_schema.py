"""Whatever fits the OpenAPI description, or does not: never a server error."""

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error

from tests.serve.conftest import Live

EXAMPLES = 15


def test_no_server_errors(live: Live) -> None:
    described = live.http.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(described)
    seen: dict[int, int] = {}
    operations = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        operations += 1
        for mode in schemathesis.GenerationMode:
            if mode is schemathesis.GenerationMode.NEGATIVE and not operation.body:
                continue  # there is nothing to get wrong
            strategy = operation.as_strategy(generation_mode=mode)

            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                derandomize=True,
                phases=(Phase.explicit, Phase.generate),
                suppress_health_check=list(HealthCheck),
            )
            @given(case=strategy)
            def probe(case) -> None:
                response = case.call(base_url=live.url, timeout=30)
                seen[response.status_code] = seen.get(response.status_code, 0) + 1
                case.validate_response(response, checks=[not_a_server_error])

            probe()
    assert operations >= 11
    assert seen.get(200, 0) > 10 and seen.get(400, 0) > 40
    assert not [status for status in seen if status >= 500], seen

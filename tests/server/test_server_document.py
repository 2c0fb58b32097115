"""What the API's document says is so: schemathesis asks what conforms to it, and what does not."""

import pytest
from hypothesis import HealthCheck, given, settings
from server_fakes import scripted_app, serving

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
# A conversation has rules that no schema can say (whose turn it is): some of what conforms is refused.
UNSAID = [schemathesis.checks.positive_data_acceptance]
FEW = settings(max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
PATHS = ["/health", "/ready", "/metrics", "/v1/models", "/v1/models/{id}", "/v1/chat/completions", "/v1/completions"]
PATHS += ["/v1/responses", "/tokenize", "/detokenize", "/tokenizer_info"]


@pytest.fixture(scope="module")
def document():
    with serving(scripted_app(b"yes")[0]) as url:
        yield schemathesis.openapi.from_url(url + "/openapi.json")


def test_the_document_names_every_path(document):
    assert [result.ok().path for result in document.get_all_operations()] == PATHS


def statuses(operation, mode):
    """What came back, where every response was as the document says."""
    seen = set()

    @FEW
    @given(case=operation.as_strategy(generation_mode=mode))
    def conforms(case):
        seen.add(case.call_and_validate(excluded_checks=UNSAID).status_code)

    conforms()
    return seen


@pytest.mark.parametrize("path", PATHS)
def test_what_conforms_is_answered(document, path):
    [operation] = document[path].values()
    seen = statuses(operation, schemathesis.GenerationMode.POSITIVE)
    always = path.endswith(("health", "ready", "metrics", "models", "info"))
    assert seen <= ({404} if "{id}" in path else {200} if always else {200, 400})


@pytest.mark.parametrize("path", [p for p in PATHS if "completions" in p or "responses" in p])
def test_what_does_not_conform_is_refused(document, path):
    assert statuses(document[path]["POST"], schemathesis.GenerationMode.NEGATIVE) == {400}

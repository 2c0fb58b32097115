// The server's API: OpenAI's chat completions, streamed.

export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The chunks of a reply as they come. ApiError where there is none, or where it breaks off. */
export async function* complete(body, key, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = "Bearer " + key;
  let response;
  try {
    response = await fetch("v1/chat/completions", { method: "POST", signal, headers, body: JSON.stringify(body) });
  } catch (error) {
    throw signal.aborted ? error : new ApiError("the server cannot be reached");
  }
  if (!response.ok) throw await refusal(response);
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message);
      yield chunk;
    }
  } catch (error) {
    if (signal.aborted || error instanceof ApiError) throw error;
  }
  throw new ApiError("the connection was lost");
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  let message = body?.error?.message || `the server answered ${response.status}`;
  const wait = Number(response.headers.get("Retry-After"));
  if (wait > 0) message += `; about ${wait}\u00a0s to wait`;
  return new ApiError(message, response.status);
}

/** The data of server-sent events. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map(l => l.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** What runs on the server, or null where it cannot be reached. */
export async function health() {
  try {
    return await (await fetch("health")).json();
  } catch {
    return null;
  }
}

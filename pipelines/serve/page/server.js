// Talking to the server: JSON in and out, one clear line when it refuses, a token when it wants one.

/** What the server (or the lack of one) said, as a line for people. */
export class Refusal extends Error {
  constructor(line, status = 0) {
    super(line);
    this.status = status;
  }
}

async function answer(path, options) {
  let response;
  try {
    response = await fetch(path, { credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server does not answer. Is it still running?");
  }
  const said = await response.json().catch(() => null);
  if (response.ok && said !== null) return said;
  throw new Refusal(said?.error ?? `The server answered ${response.status} without a word.`, response.status);
}

/** As `answer`, asking for the token where one is wanted; a stale search does not ask. */
async function entrusted(path, options) {
  for (;;) {
    try {
      return await answer(path, options);
    } catch (error) {
      if (error.status !== 401 || options?.signal?.aborted) throw error;
      await letIn();
    }
  }
}

let opening = null;

/** One prompt, however many requests wait behind it. */
function letIn() {
  opening ??= new Promise((resolve) => {
    const door = document.getElementById("door");
    const token = document.getElementById("token");
    const refused = document.getElementById("refused");
    door.addEventListener("cancel", (event) => event.preventDefault());
    door.querySelector("form").onsubmit = async (event) => {
      event.preventDefault();
      try {
        await answer("api/login", json({ token: token.value }));
      } catch (error) {
        refused.textContent = error.message;
        token.select();
        return;
      }
      door.close();
      opening = null;
      resolve();
    };
    refused.textContent = "";
    token.value = "";
    door.showModal();
  });
  return opening;
}

const json = (body) => ({
  method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
});

export const indexes = () => entrusted("api/indexes");

/** Ask for hits; pictures travel beside the query as files. */
export function find({ body, files }, signal) {
  if (!files.length) return entrusted("api/search", { ...json(body), signal });
  const form = new FormData();
  form.append("query", JSON.stringify(body));
  files.forEach((file, n) => form.append("images", file, file.name || `picture-${n}`));
  return entrusted("api/search", { method: "POST", body: form, signal });
}

export const metadata = (index, id, signal) =>
  entrusted(`api/rows/${encodeURIComponent(index)}/${id}`, { signal });

/** Where the picture of a row is, `side` pixels at most. */
export const pictureAt = (index, id, side) => `api/pictures/${encodeURIComponent(index)}/${id}?side=${side}`;

/** The picture of a row as a file, for what needs the picture itself. */
export async function pictureFile(index, id) {
  const response = await fetch(pictureAt(index, id, 512)).catch(() => null);
  if (!response?.ok) throw new Refusal("The picture of this row is not there any more.");
  return response.blob();
}

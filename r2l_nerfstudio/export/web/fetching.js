// Loads files of this folder completely, or fails with a message for the visitor.

export class MissingFile extends Error {}

/** A file inside a single-file page; undefined in any other page. @param {string} name @returns {Uint8Array<ArrayBuffer> | undefined} */
export function inlined(name) {
  const files = /** @type {{lightFieldFiles?: Record<string, string>}} */ (globalThis).lightFieldFiles;
  return files?.[name] === undefined ? undefined : Uint8Array.from(atob(files[name]), (byte) => byte.charCodeAt(0));
}

/**
 * Fetch a file completely and check it; a single-file page holds the others in base64, by name.
 *
 * @param {URL} base folder
 * @param {string} name of the file in it
 * @param {number} bytes that it has
 * @param {string | null} sha256 in hexadecimal; null to check only the size
 * @param {(done: number) => void} progress called with the bytes so far
 * @returns {Promise<Uint8Array<ArrayBuffer>>}
 */
export async function fetchWhole(base, name, bytes, sha256, progress) {
  const again = "copy the whole folder of the export to the server again, or load the page again.";
  const inside = inlined(name);
  if (inside) {
    progress(bytes);
    return inside;
  }
  let response;
  try {
    response = await fetch(new URL(name, base));
  } catch {
    throw new MissingFile(`The file ${name} did not load. Check the connection and reload the page.`);
  }
  if (!response.ok || !response.body) throw new MissingFile(`The file ${name} is missing on the server. To fix this, ${again}`);
  const found = new Uint8Array(bytes);
  let done = 0;
  try {
    for (const reader = response.body.getReader(); ; ) {
      const { done: isOver, value } = await reader.read();
      if (isOver) break;
      if (done + value.length > bytes) throw new MissingFile(`The file ${name} is not the one that was exported. To fix this, ${again}`);
      found.set(value, done);
      progress((done += value.length));
    }
  } catch (error) {
    if (error instanceof MissingFile) throw error;
    throw new MissingFile(`The file ${name} did not load completely. Check the connection and reload the page.`);
  }
  if (done !== bytes) throw new MissingFile(`The file ${name} is incomplete. To fix this, ${again}`);
  // Browsers provide crypto.subtle only over https and on localhost.
  if (sha256 && globalThis.crypto?.subtle) {
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", found));
    const hexadecimal = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    if (hexadecimal !== sha256) throw new MissingFile(`The file ${name} is damaged. To fix this, ${again}`);
  }
  return found;
}

/**
 * @param {Uint8Array<ArrayBuffer>} packed by gzip
 * @param {string} name of its file
 */
export async function unpack(packed, name) {
  const unpacker = new DecompressionStream("gzip");
  try {
    return await new Response(new Blob([packed]).stream().pipeThrough(unpacker)).arrayBuffer();
  } catch {
    throw new MissingFile(`The file ${name} is damaged. To fix this, copy the whole folder of the export to the server again.`);
  }
}

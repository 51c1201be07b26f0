// The page of a KMS without keys. Everything that comes from the server is put in as text, never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
/** How long the page waits for an answer, in milliseconds; the server's own deadlines are shorter. */
const PATIENCE = { status: 15_000, info: 60_000, work: 180_000 };
const STATUS_INTERVAL = 5_000;

/** The setup token. Only here: no storage, no URL. */
let token = "";
let status = null;
let over = false;

/** An answer that is none, in words for the operator. */
class Refusal extends Error {
  constructor(text, code) {
    super(text);
    this.code = code;
  }
}

async function ask(path, body, patience) {
  const headers = { accept: "application/json" };
  if (token !== "") headers["x-onboard-token"] = token;
  const options = { headers, cache: "no-store", credentials: "omit", signal: AbortSignal.timeout(patience) };
  if (body !== undefined) {
    options.method = "POST";
    headers["content-type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let response;
  let text;
  try {
    response = await fetch(path, options);
    text = await response.text();
  } catch (error) {
    if (error.name === "TimeoutError") {
      throw new Refusal(`The KMS gave no answer within ${patience / 1000} seconds.`, "timeout");
    }
    throw new Refusal("The KMS cannot be reached. It may have stopped, or the network between is down.", "network");
  }
  let value = null;
  try {
    value = text === "" ? null : JSON.parse(text);
  } catch {
    throw new Refusal(`The KMS gave an answer that is not understood (status ${response.status}).`, "garbage");
  }
  if (response.ok) return value;
  const words = typeof value?.error === "string" ? value.error : `The KMS refused (status ${response.status}).`;
  throw new Refusal(words, response.status);
}

const call = (method, message, patience) => ask(`/prpc/${method}?json`, message, patience);

/** What to do next, where the server's words tell. */
function advice(error) {
  const words = error.message;
  const known = [
    [error.code === "network", "Check that the kms-server process runs, then try again. Keys that were made are kept."],
    [error.code === "timeout", "Look at the server's log. Reload this page to see whether keys were made meanwhile."],
    [words.includes("another site"), "Open this page by the address that the server listens on."],
    [error.code === 401, "Enter the token that the server printed on its console."],
    [error.code === 403, "core.onboard.allow_from in kms.toml lists who may set up this KMS."],
    [error.code === 429, "Restart the server; it prints a new token."],
    [error.code === 503, "The server is busy. Try again in a moment."],
    [words.includes("already been"), "Reload this page to see its keys."],
    [words.includes("DNS label") || words.includes("domain"), "Write the host name alone: no https://, no port, no path."],
    [words.includes("not allowed"), "Register this machine with the commands under “Register it”, wait until they are confirmed, and try again."],
    [words.includes("authoris") || words.includes("auth api"), "Check the address in [core.auth_api] of kms.toml, and that the authoriser runs."],
    [words.includes("attestation") || words.includes("VM info") || words.includes("agent"), "Check that the guest agent of this machine answers: /var/run/dstack.sock or DSTACK_AGENT_ADDRESS."],
    [words.includes("Failed to onboard"), "Check the URL of the other KMS, that it runs, and that its authoriser allows this machine."],
  ];
  return known.find(([applies]) => applies)?.[1] ?? "Nothing was changed. The server's log says more.";
}

function showError(title, error) {
  $("alert-title").textContent = title;
  $("alert-text").textContent = error.message;
  $("alert-next").textContent = advice(error);
  $("alert").hidden = false;
  $("alert").scrollIntoView({ block: "nearest" });
}

function clearError() {
  $("alert").hidden = true;
}

function announce(text) {
  $("announce").textContent = text;
}

async function copy(text, button) {
  let copied = false;
  try {
    // Absent on plain HTTP, which is what this page usually comes over.
    await navigator.clipboard.writeText(text);
    copied = true;
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    area.setAttribute("aria-hidden", "true");
    area.className = "visually-hidden";
    document.body.append(area);
    area.select();
    copied = document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = copied ? "Copied" : "Select";
  announce(copied ? "Copied to the clipboard" : "Copying is not allowed here; select the text instead");
  if (!copied) getSelection().selectAllChildren(button.parentElement.querySelector("code"));
  setTimeout(() => { button.textContent = "Copy"; }, 2_000);
}

function copies(button, what, text) {
  button.setAttribute("aria-label", `Copy ${what}`);
  button.addEventListener("click", () => copy(text, button));
}

function facts(list, entries) {
  list.replaceChildren(...entries.filter(([, value]) => value).map(([name, value, plain]) => {
    const row = $("fact").content.cloneNode(true);
    row.querySelector("dt").textContent = name;
    const code = row.querySelector("code");
    code.textContent = value;
    // Long ones scroll, and so need the keyboard.
    if (value.length > 400) {
      code.tabIndex = 0;
      code.setAttribute("role", "region");
      code.setAttribute("aria-label", name);
    }
    const button = row.querySelector("button");
    if (plain) button.remove();
    else copies(button, name, value);
    return row;
  }));
}

/** A word of a shell command, whoever wrote it. */
function quoted(text) {
  const clean = text.replace(/[\u0000-\u001f\u007f]/gu, "");
  return /^[\w./:@%+=,-]+$/u.test(clean) ? clean : `'${clean.replaceAll("'", "'\\''")}'`;
}

function showRegistration(info) {
  const kind = status?.authoriser?.kind ?? "";
  if (kind === "dev") return;
  const contract = info.kms_contract_address;
  const kms = contract ? `--kms ${quoted(contract)}` : "--kms \"$KMS_CONTRACT_ADDR\"";
  const rpc = info.eth_rpc_url ? `--rpc-url ${quoted(info.eth_rpc_url)}` : "--rpc-url \"$RPC_URL\"";
  const command = (name, value) => `keyferry chain ${name} 0x${value} ${kms} ${rpc}`;
  const steps = [
    ["Allow the image of this machine", command("add-image", info.os_image_hash), info.os_image_hash],
    ["Allow this KMS by its measurement", command("add-kms", info.mr_aggregated), info.mr_aggregated],
    ["Allow this device", command("add-device", info.device_id), info.device_id],
  ];
  $("register-text").textContent = kind === "policy"
    ? "This KMS decides by a policy file, so nothing has to be on chain for it. If other nodes decide by the contract, run these."
    : "Run these with the key of the contract's owner (--keystore FILE, or PRIVATE_KEY). They show what they will do and ask first.";
  $("commands").replaceChildren(...steps.filter(([, , value]) => value).map(([what, text]) => {
    const item = $("command").content.cloneNode(true);
    item.querySelector("p").textContent = what;
    item.querySelector("code").textContent = text;
    item.querySelector("pre").setAttribute("aria-label", `Command: ${what}`);
    copies(item.querySelector("button"), `the command: ${what}`, text);
    return item;
  }));
  $("register").hidden = false;
}

async function loadInfo() {
  $("info-retry").hidden = true;
  $("info-wait").hidden = false;
  try {
    const info = await call("GetAttestationInfo", null, PATIENCE.info);
    clearError();
    facts($("info"), [
      ["TEE variant", info.tee_variant, true],
      ["Device id", info.device_id],
      ["Aggregated measurement (mr_aggregated)", info.mr_aggregated],
      ["OS image hash", info.os_image_hash],
      ["KMS contract", info.kms_contract_address],
      ["Chain endpoint", info.eth_rpc_url],
    ]);
    $("info").hidden = false;
    showRegistration(info);
  } catch (error) {
    showError("This machine's evidence is not available", error);
    $("info-retry").hidden = false;
  } finally {
    $("info-wait").hidden = true;
  }
}

function showLight() {
  const authoriser = status.authoriser;
  const [state, text] = status.locked
    ? ["unknown", "Locked: enter the setup token"]
    : authoriser.good
      ? ["good", `Authoriser (${authoriser.kind}) is ready`]
      : authoriser.waiting
        ? ["warn", `Authoriser (${authoriser.kind}) has not answered yet`]
        : ["bad", `Authoriser (${authoriser.kind}): ${authoriser.trouble}`];
  light(state, text);
}

function light(state, text) {
  $("light").dataset.state = state;
  // Only what changes is read out.
  if ($("light-text").textContent !== text) $("light-text").textContent = text;
}

function showStatus() {
  document.title = status.site_name ? `${status.site_name}: KMS setup` : "Set up this KMS";
  $("title").textContent = status.site_name ? `Set up the KMS of ${status.site_name}` : "Set up this KMS";
  showLight();
  $("unlock").hidden = !status.locked;
  $("setup").hidden = status.locked;
  if (status.locked) return;
  const keys = status.keys;
  $("choose").hidden = Boolean(keys);
  $("done").hidden = !keys;
  if (!keys) return;
  $("done-text").textContent = `It will answer as ${keys.domain}. Its clients should pin the keys below.`;
  facts($("keys"), [
    ["Host name", keys.domain],
    ["Root k256 public key", keys.k256_pubkey],
    ["Root CA public key (SubjectPublicKeyInfo)", keys.ca_pubkey],
    ["Attestation of these keys", keys.attestation],
  ]);
}

async function refresh() {
  status = await ask("/status", undefined, PATIENCE.status);
  showStatus();
}

async function watch() {
  for (;;) {
    await new Promise((resolve) => { setTimeout(resolve, STATUS_INTERVAL); });
    if (over) return;
    if (document.hidden || !$("progress").hidden) continue;
    try {
      const before = status;
      status = await ask("/status", undefined, PATIENCE.status);
      if (over) return;
      showLight();
      if (status.locked !== before.locked || Boolean(status.keys) !== Boolean(before.keys)) showStatus();
    } catch (error) {
      light("bad", error.message);
    }
  }
}

function fieldError(input, error, text) {
  error.textContent = text;
  error.hidden = text === "";
  if (text === "") input.removeAttribute("aria-invalid");
  else input.setAttribute("aria-invalid", "true");
  return text === "";
}

function domainProblem(text) {
  if (text === "") return "Enter the host name.";
  if (/[/:\s]/u.test(text)) return "Write the host name alone: no https://, no port, no path, no blanks.";
  const label = /^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$/iu;
  if (text.length > 253 || !text.split(".").every((part) => label.test(part))) {
    return "A host name has letters, digits and hyphens between dots, at most 63 in a part.";
  }
  return "";
}

function urlProblem(text) {
  if (text === "") return "Enter the URL of the running KMS.";
  let url;
  try {
    url = new URL(text);
  } catch {
    return "This is not a URL. It begins with https://";
  }
  if (url.protocol !== "https:") return "The URL begins with https://";
  if (url.username !== "" || url.password !== "") return "The URL has no user name or password in it.";
  return "";
}

/** Checks every field and puts the cursor into the first one that is wrong. */
function valid(fields) {
  let first = null;
  for (const [input, error, problem] of fields) {
    input.value = input.value.trim();
    if (!fieldError($(input.id), $(error), problem(input.value))) first ??= input;
  }
  first?.focus();
  return first === null;
}

async function work(what, method, message, title) {
  clearError();
  const started = performance.now();
  const tick = () => {
    $("progress-time").textContent = `${Math.floor((performance.now() - started) / 1000)} s`;
  };
  $("choose").hidden = true;
  $("progress").hidden = false;
  $("progress-text").textContent = what;
  tick();
  const clock = setInterval(tick, 1_000);
  try {
    await call(method, message, PATIENCE.work);
    await refresh();
    $("done-h").focus();
    announce("This KMS has keys now");
  } catch (error) {
    showError(title, error);
    $("choose").hidden = Boolean(status?.keys);
  } finally {
    clearInterval(clock);
    $("progress").hidden = true;
  }
}

$("unlock-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  clearError();
  token = $("token").value.trim().toLowerCase();
  try {
    await refresh();
    if (status.locked) throw new Refusal("This is not the token of this run of the server.", 401);
    $("token").value = "";
    $("main").focus();
    await loadInfo();
  } catch (error) {
    token = "";
    showError("Still locked", error);
    $("token").focus();
  }
});

$("bootstrap-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const domain = $("bootstrap-domain");
  if (!valid([[domain, "bootstrap-error", domainProblem]])) return;
  const message = { domain: domain.value };
  await work("Making root keys, and asking the machine to attest them…", "Bootstrap", message, "No keys were made");
});

$("onboard-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const [source, domain] = [$("source-url"), $("onboard-domain")];
  if (!valid([[source, "source-error", urlProblem], [domain, "onboard-error", domainProblem]])) return;
  const message = { source_url: source.value, domain: domain.value };
  const what = "Attesting this machine to the other KMS, checking its evidence, and fetching its keys…";
  await work(what, "Onboard", message, "No keys were taken over");
});

$("finish").addEventListener("click", async () => {
  clearError();
  $("finish").disabled = true;
  try {
    await call("Finish", null, PATIENCE.status);
    over = true;
    const keys = status.keys;
    facts($("over-facts"), [["The KMS answers at", `https://${keys.domain}:${status.port}`], ["Root k256 public key", keys.k256_pubkey]]);
    $("done").hidden = true;
    $("register").hidden = true;
    $("over").hidden = false;
    light("good", "Setup is finished");
    $("over-h").focus();
  } catch (error) {
    showError("Setup is not finished", error);
    $("finish").disabled = false;
  }
});

$("info-retry").addEventListener("click", loadInfo);

(async () => {
  try {
    await refresh();
    if (!status.locked) await loadInfo();
    else $("token").focus();
  } catch (error) {
    light("bad", "The KMS does not answer");
    showError("This page has no connection to its KMS", error);
  }
  watch();
})();

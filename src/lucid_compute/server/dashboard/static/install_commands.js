// The commands that start an agent beside an inference server, with this service's address and a key filled in. Pure.
export const WAYS = [
  ["clone", "This copy", "in a copy of the repository, after make install"],
  ["pip", "pip", "in a copy of the repository; or with a wheel's file instead of the dot"],
  ["docker", "Docker", "in a copy of the repository; the container sees the GPUs and this machine's network"],
  ["systemd", "systemd", "as root, in a copy of the repository"],
  ["curl", "curl", "without the agent: registers the node, then sends a heartbeat every ten seconds"],
];

// `about` is { service, key, name, url, publicUrl, isOutbound, vram, gpu, model }.
export function commandOf(way, about) {
  return { clone, pip, docker, systemd, curl }[way](about);
}

function optionsOf({ name, url, publicUrl, isOutbound, vram }) {
  const options = { name, url, "public-url": isOutbound ? "" : publicUrl, vram };
  return [...given(options).map(([option, value]) => `--${option} ${quoted(value)}`), ...(isOutbound ? ["--outbound"] : [])].join(" ");
}

const environmentOf = ({ service, key }) => `LUCID_API_URL=${quoted(service)} LUCID_API_KEY=${quoted(key)}`;

const clone = (about) => `${environmentOf(about)} .venv/bin/lucid agent run ${optionsOf(about)}`;

const pip = (about) => `python3 -m venv lucid-agent && lucid-agent/bin/pip install . && \\
  ${environmentOf(about)} lucid-agent/bin/lucid agent run ${optionsOf(about)}`;

const docker = (about) => `docker build --target agent -t lucid-agent . && \\
  docker run -d --restart unless-stopped --gpus all --network host \\
  ${environmentOf(about).split(" ").map((variable) => `-e ${variable}`).join(" ")} \\
  lucid-agent ${optionsOf(about)}`;

const systemd = (about) => {
  const variables = { API_URL: about.service, API_KEY: about.key, AGENT_NAME: about.name, AGENT_URL: about.url, AGENT_PUBLIC_URL: about.isOutbound ? "" : about.publicUrl, AGENT_OUTBOUND: about.isOutbound ? "true" : "", AGENT_VRAM: about.vram };
  return `python3 -m venv /opt/lucid && /opt/lucid/bin/pip install . && \\
  install -d -m 0755 /etc/lucid && install -m 0600 /dev/null /etc/lucid/agent.env && \\
  printf '%s\\n' ${given(variables).map(([name, value]) => quoted(`LUCID_${name}=${value}`)).join(" ")} > /etc/lucid/agent.env && \\
  install -m 0644 deploy/lucid-agent.service /etc/systemd/system/ && systemctl enable --now lucid-agent`;
};

function curl({ service, key, name, url, publicUrl, vram, gpu, model }) {
  const passport = { name, type: "compute", metadata: { gpu: gpu || "GPU", vram: vram || "24GB", inferenceUrl: publicUrl || url } };
  const heartbeat = JSON.stringify({ passportId: "ID", status: "healthy", load: 0, queueDepth: 0, availableModels: model ? [model] : [] });
  const [before, after] = heartbeat.split("ID");
  const post = (path, body) => `curl -sS --fail-with-body ${quoted(service + path)} -H "Authorization: Bearer $KEY" -d ${body}`;
  return `KEY=${quoted(key)}
ANSWER=$(${post("/passports", quoted(JSON.stringify(passport)))}) || { echo "$ANSWER"; false; } &&
ID=$(echo "$ANSWER" | sed -n 's/.*"id":"\\([^"]*\\)".*/\\1/p') &&
while ${post("/compute/heartbeat", `${quoted(before)}"$ID"${quoted(after)}`)}; do echo; sleep 10; done`;
}

const given = (values) => Object.entries(values).filter(([, value]) => value);

// A word as a shell takes it.
export function quoted(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

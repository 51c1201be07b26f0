//! What exists on the VMM, and what calls do to it. Source of the rules: `vmm/src/main_service.rs` of Dstack-TEE/dstack.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// The request side of the published RPC.
const RPC: &str = include_str!("../../vmm/rpc.json");
/// Ports of the host that may be published.
const PORTS: std::ops::RangeInclusive<u64> = 1..=32_767;

pub(super) struct State {
    rpc: Value,
    machines: BTreeMap<String, Machine>,
    counter: u64,
    /// What a guest prints as it starts.
    pub(super) boot_text: String,
}

struct Machine {
    configuration: Value,
    running: bool,
    /// The ports its guest was started with.
    open: Value,
    console: String,
}

impl Machine {
    fn name(&self) -> &str {
        self.configuration["name"].as_str().unwrap_or_default()
    }

    /// A log begins anew with each boot.
    fn start(&mut self, boot_text: &str) {
        if !self.running {
            self.running = true;
            self.open = self.configuration["ports"].clone();
            boot_text.clone_into(&mut self.console);
        }
    }

    fn status(&self) -> &'static str {
        if self.running { "running" } else { "stopped" }
    }

    fn describe(&self, id: &str) -> Value {
        json!({
            "id": id,
            "name": self.name(),
            "status": self.status(),
            "uptime": "1m",
            "app_id": "00".repeat(20),
            "configuration": self.configuration,
            "boot_progress": if self.running { "done" } else { "" },
            "boot_error": "",
            "image_version": "0.6.0",
            "events": [],
            "interfaces": [],
        })
    }
}

impl Default for State {
    fn default() -> Self {
        let rpc = serde_json::from_str(RPC).expect("the description is JSON");
        Self { rpc, machines: BTreeMap::new(), counter: 0, boot_text: String::new() }
    }
}

impl State {
    pub(super) fn machines(&self) -> Vec<String> {
        self.machines.values().map(|it| format!("{} {}", it.name(), it.status())).collect()
    }

    pub(super) fn configuration(&self, name: &str) -> Option<Value> {
        self.machines.values().find(|it| it.name() == name).map(|it| it.configuration.clone())
    }

    pub(super) fn open_ports(&self, name: &str) -> Vec<String> {
        let found = self.machines.values().filter(|it| it.name() == name && it.running);
        let ports = found.flat_map(|it| it.open.as_array().cloned().unwrap_or_default());
        let text = |port: &Value, name: &str| port[name].to_string().trim_matches('"').to_owned();
        let parts = ["protocol", "host_address", "host_port", "vm_port"];
        ports.map(|port| parts.map(|name| text(&port, name)).join(":")).collect()
    }

    pub(super) fn print(&mut self, name: &str, text: &str) {
        for machine in self.machines.values_mut().filter(|it| it.name() == name) {
            machine.console.push_str(text);
        }
    }

    pub(super) fn log(&self, id: &str, lines: usize) -> Option<String> {
        let console = &self.machines.get(id)?.console;
        let all: Vec<&str> = console.split_inclusive('\n').collect();
        Some(all[all.len().saturating_sub(lines)..].concat())
    }

    pub(super) fn call(&mut self, method: &str, body: &Value) -> Result<Value, String> {
        let message =
            self.rpc["methods"][method].as_str().ok_or_else(|| format!("no method {method}"))?.to_owned();
        self.check(&message, body)?;
        let id = body["id"].as_str().unwrap_or_default().to_owned();
        match method {
            "Version" => Ok(json!({"version": "0.6.0", "rev": "312dc605"})),
            "GetMeta" => Ok(json!({"resources": {
                "max_cvm_number": 1000, "max_allocable_vcpu": 20, "max_allocable_memory_in_mb": 100_000,
            }})),
            "ListImages" => Ok(json!({"images": [
                {"name": "dstack-0.6.0", "description": "{}", "version": "0.6.0", "is_dev": false},
                {"name": "dstack-dev-0.6.0", "description": "{}", "version": "0.6.0", "is_dev": true},
            ]})),
            "Status" => {
                let keyword = body["keyword"].as_str().unwrap_or_default();
                let found = self
                    .machines
                    .iter()
                    .filter(|(id, it)| it.name().contains(keyword) || id.contains(keyword));
                let vms: Vec<Value> = found.map(|(id, it)| it.describe(id)).collect();
                Ok(json!({"total": vms.len(), "vms": vms, "port_mapping_enabled": true}))
            }
            "GetInfo" => match self.machines.get(&id) {
                Some(machine) => Ok(json!({"found": true, "info": machine.describe(&id)})),
                None => Ok(json!({"found": false, "info": null})),
            },
            "CreateVm" => self.create(body),
            "StartVm" | "StopVm" | "ShutdownVm" => {
                let machine = self.machines.get_mut(&id).ok_or_else(|| format!("VM not found: {id}"))?;
                match method {
                    "StartVm" => machine.start(&self.boot_text),
                    _ => machine.running = false,
                }
                Ok(Value::Null)
            }
            "UpdateVm" => self.update(&id, body),
            "RemoveVm" => match self.machines.get(&id) {
                None => Err(format!("VM not found: {id}")),
                Some(machine) if machine.running => Err("VM is running, stop it first".to_owned()),
                Some(_) => {
                    self.machines.remove(&id);
                    Ok(Value::Null)
                }
            },
            other => Err(format!("{other} is not part of this stand-in")),
        }
    }

    fn create(&mut self, body: &Value) -> Result<Value, String> {
        let text = |name: &str| body[name].as_str().unwrap_or_default();
        let allowed = |it: char| it.is_ascii_alphanumeric() || "-_. @~!$^()".contains(it);
        if !text("name").chars().all(allowed) {
            return Err(format!("Invalid name: {}", text("name")));
        }
        if serde_json::from_str::<Map<String, Value>>(text("compose_file")).is_err() {
            return Err("Invalid compose file".to_owned());
        }
        if !["dstack-0.6.0", "dstack-dev-0.6.0"].contains(&text("image")) {
            return Err(format!("Failed to load VM: Failed to load image: {}", text("image")));
        }
        let mut configuration = body.clone();
        for port in configuration["ports"].as_array_mut().into_iter().flatten() {
            let number = port["host_port"].as_u64().unwrap_or_default();
            if !PORTS.contains(&number) {
                return Err(format!("Port mapping is not allowed for {}:{number}", port["protocol"]));
            }
            if port["host_address"] == json!("") {
                port["host_address"] = json!("127.0.0.1");
            }
        }
        self.check_ports("", &configuration)?;
        self.counter += 1;
        let id = format!("00000000-0000-4000-8000-{:012}", self.counter);
        let mut machine =
            Machine { configuration, running: false, open: Value::Null, console: String::new() };
        if body["stopped"] != json!(true) {
            machine.start(&self.boot_text);
        }
        self.machines.insert(id.clone(), machine);
        Ok(json!({ "id": id }))
    }

    /// Only ports can be changed here. They hold from the guest's next start on.
    fn update(&mut self, id: &str, body: &Value) -> Result<Value, String> {
        let others =
            ["update_kms_urls", "update_gateway_urls", "update_networking", "vcpu", "memory", "image"];
        if others.iter().any(|it| body.get(it).is_some()) || body["compose_file"].is_string() {
            return Err("only ports are changed in this stand-in".to_owned());
        }
        if !self.machines.contains_key(id) {
            return Err("Failed to read manifest".to_owned());
        }
        if body["update_ports"] == json!(true) {
            let addresses = body["ports"].as_array().into_iter().flatten();
            let mut addresses = addresses.map(|port| port["host_address"].as_str().unwrap_or_default());
            if addresses.any(|it| it.parse::<std::net::IpAddr>().is_err()) {
                return Err("Invalid host address".to_owned());
            }
            self.check_ports(id, body)?;
            if let Some(machine) = self.machines.get_mut(id) {
                machine.configuration["ports"] = body["ports"].clone();
            }
        }
        // The id of the compose, and none was given.
        Ok(json!({"id": ""}))
    }

    /// Refuses a port that another machine than `own` has on the same address, or on any.
    fn check_ports(&self, own: &str, body: &Value) -> Result<(), String> {
        let ports = |it: &Value| it["ports"].as_array().cloned().unwrap_or_default();
        let any = |port: &Value| port["host_address"] == json!("0.0.0.0");
        for port in ports(body) {
            for (id, other) in self.machines.iter().filter(|(id, _)| *id != own) {
                let clashes = |it: &Value| {
                    it["host_port"] == port["host_port"]
                        && (any(it) || any(&port) || it["host_address"] == port["host_address"])
                };
                if ports(&other.configuration).iter().any(clashes) {
                    return Err(format!("host port mapping conflicts with VM {id}: {}", port["host_port"]));
                }
            }
        }
        Ok(())
    }

    /// Refuses fields the RPC does not have, and values of another type.
    fn check(&self, message: &str, body: &Value) -> Result<(), String> {
        let empty = json!({});
        let fields = if message == "Empty" { &empty } else { &self.rpc["messages"][message] };
        let body = body.as_object().ok_or_else(|| format!("{message}: not an object"))?;
        for (name, value) in body {
            let kind = fields[name].as_str().ok_or_else(|| format!("{message} has no field {name}"))?;
            let (repeated, kind) = match kind.split_once(' ') {
                Some((how, kind)) => (how == "repeated", kind),
                None => (false, kind),
            };
            let wrong = || format!("{message}.{name}: {value} is no {kind}");
            let items = match (repeated, value) {
                (true, Value::Array(items)) => items.as_slice(),
                (true, _) => return Err(wrong()),
                (false, value) => std::slice::from_ref(value),
            };
            for item in items {
                match kind {
                    "string" | "bytes" if item.is_string() => {}
                    "uint32" if item.as_u64().is_some_and(|it| u32::try_from(it).is_ok()) => {}
                    "bool" if item.is_boolean() => {}
                    "string" | "bytes" | "uint32" | "bool" => return Err(wrong()),
                    inner => self.check(inner, item)?,
                }
            }
        }
        Ok(())
    }
}

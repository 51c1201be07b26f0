//! What exists on the VMM, and what calls do to it. Source of the rules: `vmm/src/main_service.rs` of Dstack-TEE/dstack.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// The request side of the published RPC.
const RPC: &str = include_str!("../../vmm/rpc.json");
/// Ports of the host that may be published.
const PORTS: std::ops::RangeInclusive<u64> = 1..=20_000;

pub(super) struct State {
    rpc: Value,
    machines: BTreeMap<String, Machine>,
    counter: u64,
}

struct Machine {
    configuration: Value,
    running: bool,
    console: String,
}

impl Machine {
    fn name(&self) -> &str {
        self.configuration["name"].as_str().unwrap_or_default()
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
        Self { rpc, machines: BTreeMap::new(), counter: 0 }
    }
}

impl State {
    pub(super) fn machines(&self) -> Vec<String> {
        self.machines.values().map(|it| format!("{} {}", it.name(), it.status())).collect()
    }

    pub(super) fn configuration(&self, name: &str) -> Option<Value> {
        self.machines.values().find(|it| it.name() == name).map(|it| it.configuration.clone())
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
            "StartVm" | "StopVm" => {
                let machine = self.machines.get_mut(&id).ok_or_else(|| format!("VM not found: {id}"))?;
                machine.running = method == "StartVm";
                Ok(Value::Null)
            }
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
        let ports = |it: &Value| it["ports"].as_array().cloned().unwrap_or_default();
        for port in ports(body) {
            let number = port["host_port"].as_u64().unwrap_or_default();
            if !PORTS.contains(&number) {
                return Err(format!("Port mapping is not allowed for {}:{number}", port["protocol"]));
            }
            for (id, other) in &self.machines {
                if ports(&other.configuration).iter().any(|it| it["host_port"] == port["host_port"]) {
                    return Err(format!("host port mapping conflicts with VM {id}: {number}"));
                }
            }
        }
        self.counter += 1;
        let id = format!("00000000-0000-4000-8000-{:012}", self.counter);
        let running = body["stopped"] != json!(true);
        let machine = Machine { configuration: body.clone(), running, console: String::new() };
        self.machines.insert(id.clone(), machine);
        Ok(json!({ "id": id }))
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

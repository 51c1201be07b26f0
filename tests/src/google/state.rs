//! What exists in the stand-in's project, and what calls do to it.

use std::collections::BTreeMap;

use regex::Regex;
use serde_json::{Value, json};

use super::schema::Matched;

/// A serial port keeps this much.
const CONSOLE: usize = 1 << 20;
/// Reads of an operation before it is done.
const POLLS: u32 = 1;

/// An error as Google answers it: status, reason, message.
pub(super) type Refusal = (u16, &'static str, String);

pub(super) struct State {
    pub(super) external_address: String,
    /// What instances print as they start.
    pub(super) boot_text: String,
    /// Address of Compute Engine, which its answers name things by.
    pub(super) address: String,
    /// By `KIND PLACE/NAME`, as the inventory shows it.
    resources: BTreeMap<String, Value>,
    operations: BTreeMap<String, Operation>,
    consoles: BTreeMap<String, Console>,
    pub(super) objects: BTreeMap<(String, String), Vec<u8>>,
    pub(super) sessions: BTreeMap<String, super::storage::Session>,
    pub(super) counter: u64,
    /// The archives that images were made from.
    archives: BTreeMap<String, Vec<u8>>,
    /// Answers by `requestId`: a repeated change happens once.
    answered: BTreeMap<String, Value>,
}

struct Operation {
    polls: u32,
    answer: Value,
    error: Option<(&'static str, &'static str)>,
}

#[derive(Default)]
struct Console {
    text: String,
    /// Position of the first byte that is kept.
    start: u64,
}

impl Default for State {
    fn default() -> Self {
        Self {
            external_address: "203.0.113.10".to_owned(),
            boot_text: String::new(),
            address: "https://www.googleapis.com/compute/v1/".to_owned(),
            resources: BTreeMap::new(),
            operations: BTreeMap::new(),
            consoles: BTreeMap::new(),
            objects: BTreeMap::new(),
            sessions: BTreeMap::new(),
            counter: 0,
            archives: BTreeMap::new(),
            answered: BTreeMap::new(),
        }
    }
}

/// What guards a change of tags. Google's are bytes as base64, which gcloud decodes.
fn fingerprint(counter: u64) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::URL_SAFE.encode(counter.to_be_bytes())
}

/// A filter of a list, in the two forms that are used: ours and gcloud's.
enum Filter {
    /// `labels.NAME=VALUE`
    Label(String, String),
    /// `name eq "REGEX"`, the whole name
    Name(Regex),
}

impl Filter {
    fn parse(text: &str) -> Result<Self, Refusal> {
        let invalid = || (400, "invalid", "Invalid list filter expression.".to_owned());
        if let Some((name, value)) = text.strip_prefix("labels.").and_then(|it| it.split_once('=')) {
            return Ok(Self::Label(name.to_owned(), value.to_owned()));
        }
        let pattern = text.strip_prefix("name eq ").map(|it| it.trim_matches('"')).ok_or_else(invalid)?;
        Regex::new(&format!("^(?:{pattern})$")).map(Self::Name).map_err(|_| invalid())
    }

    fn takes(&self, resource: &Value) -> bool {
        match self {
            Self::Label(name, value) => resource["labels"][name] == json!(value),
            Self::Name(pattern) => resource["name"].as_str().is_some_and(|name| pattern.is_match(name)),
        }
    }
}

fn not_found(what: &str) -> Refusal {
    (404, "notFound", format!("The resource '{what}' was not found"))
}

impl State {
    pub(super) fn inventory(&self) -> Vec<String> {
        let objects = self.objects.keys().map(|(bucket, name)| format!("object {bucket}/{name}"));
        self.resources.keys().cloned().chain(objects).collect()
    }

    pub(super) fn resource(&self, line: &str) -> Option<Value> {
        self.resources.get(line).cloned()
    }

    pub(super) fn object(&self, bucket: &str, name: &str) -> Option<Vec<u8>> {
        self.objects.get(&(bucket.to_owned(), name.to_owned())).cloned()
    }

    pub(super) fn archive(&self, image: &str) -> Option<Vec<u8>> {
        self.archives.get(image).cloned()
    }

    pub(super) fn print(&mut self, instance: &str, text: &str) {
        let console = self.consoles.entry(instance.to_owned()).or_default();
        console.text.push_str(text);
        while console.text.len() > CONSOLE {
            let first = console.text.remove(0);
            console.start += first.len_utf8() as u64;
        }
    }

    /// Carries a call to Compute Engine out.
    pub(super) fn compute(
        &mut self,
        call: &Matched<'_>,
        query: &[(String, String)],
        body: Option<&Value>,
        fails: Option<(&'static str, &'static str)>,
    ) -> Result<Value, Refusal> {
        let parameter =
            |name: &str| query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        let request = parameter("requestId").map(str::to_owned);
        if let Some(answer) = request.as_ref().and_then(|id| self.answered.get(id)) {
            return Ok(answer.clone());
        }
        let zone = call.get("zone");
        let answer = match call.id() {
            "compute.projects.get" => {
                json!({"name": call.get("project"), "defaultServiceAccount": "1-compute@x"})
            }
            "compute.zones.get" => self.zone(zone)?,
            "compute.machineTypes.get" => match call.get("machineType") {
                name if name.starts_with("c3-standard-") => json!({"name": name, "guestCpus": 4}),
                name => return Err(not_found(name)),
            },
            "compute.instances.get" => self.read(&format!("instance {zone}/{}", call.get("instance")))?,
            "compute.disks.get" => self.read(&format!("disk {zone}/{}", call.get("disk")))?,
            "compute.images.get" => self.read(&format!("image {}", call.get("image")))?,
            "compute.firewalls.get" => self.read(&format!("firewall {}", call.get("firewall")))?,
            "compute.firewalls.list" => self.list("firewall ", parameter("filter"))?,
            "compute.instances.aggregatedList" => self.aggregated(parameter("filter"))?,
            "compute.instances.getSerialPortOutput" => self.console(call, parameter("start"))?,
            "compute.zoneOperations.wait" | "compute.globalOperations.wait" => {
                return self.wait(call.get("operation"));
            }
            change => {
                if fails.is_none() {
                    self.change(change, call, query, body)?;
                }
                self.operation(call, body, fails)
            }
        };
        if let Some(id) = request {
            self.answered.insert(id, answer.clone());
        }
        Ok(answer)
    }

    fn zone(&self, name: &str) -> Result<Value, Refusal> {
        let platforms = match name {
            "us-central1-a" | "us-central1-b" | "europe-west4-a" => {
                json!(["Intel Sapphire Rapids", "AMD Milan"])
            }
            "us-west2-a" => json!(["Intel Cascade Lake"]),
            _ => return Err(not_found(name)),
        };
        Ok(json!({"name": name, "status": "UP", "availableCpuPlatforms": platforms}))
    }

    fn read(&self, key: &str) -> Result<Value, Refusal> {
        self.resources.get(key).cloned().ok_or_else(|| not_found(key))
    }

    fn list(&self, kind: &str, filter: Option<&str>) -> Result<Value, Refusal> {
        let filter = filter.map(Filter::parse).transpose()?;
        let found = self.resources.iter().filter(|(key, _)| key.starts_with(kind)).map(|(_, value)| value);
        let items: Vec<&Value> =
            found.filter(|it| filter.as_ref().is_none_or(|filter| filter.takes(it))).collect();
        Ok(json!({ "items": items }))
    }

    fn aggregated(&self, filter: Option<&str>) -> Result<Value, Refusal> {
        let filter = filter.map(Filter::parse).transpose()?;
        let mut scopes = serde_json::Map::new();
        for (key, instance) in self.resources.iter().filter(|(key, _)| key.starts_with("instance ")) {
            if filter.as_ref().is_some_and(|filter| !filter.takes(instance)) {
                continue;
            }
            let zone = key["instance ".len()..].split('/').next().unwrap_or_default();
            let scope = scopes.entry(format!("zones/{zone}")).or_insert_with(|| json!({"instances": []}));
            scope["instances"].as_array_mut().expect("made above").push(instance.clone());
        }
        Ok(json!({ "items": scopes }))
    }

    fn console(&self, call: &Matched<'_>, start: Option<&str>) -> Result<Value, Refusal> {
        let (zone, name) = (call.get("zone"), call.get("instance"));
        self.read(&format!("instance {zone}/{name}"))?;
        let empty = Console::default();
        let console = self.consoles.get(name).unwrap_or(&empty);
        let end = console.start + console.text.len() as u64;
        let from = start.and_then(|it| it.parse().ok()).unwrap_or(0).clamp(console.start, end);
        let offset = usize::try_from(from - console.start).expect("below a MiB");
        Ok(json!({
            "contents": console.text.get(offset..).unwrap_or_default(),
            "start": from.to_string(),
            "next": end.to_string(),
        }))
    }

    fn operation(
        &mut self,
        call: &Matched<'_>,
        body: Option<&Value>,
        error: Option<(&'static str, &'static str)>,
    ) -> Value {
        self.counter += 1;
        let name = format!("operation-{}", self.counter);
        let project = format!("{}projects/{}", self.address, call.get("project"));
        let place = match call.get("zone") {
            "" => "global".to_owned(),
            zone => format!("zones/{zone}"),
        };
        let mut words = call.id().split('.').skip(1);
        let (collection, verb) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let target = match body.and_then(|body| body["name"].as_str()) {
            Some(name) if verb == "insert" => name,
            _ => call.get(collection.strip_suffix('s').unwrap_or(collection)),
        };
        let mut answer = json!({
            "kind": "compute#operation",
            "name": name,
            "operationType": verb,
            "selfLink": format!("{project}/{place}/operations/{name}"),
            "status": "RUNNING",
            "targetLink": format!("{project}/{place}/{collection}/{target}"),
        });
        if place != "global" {
            answer["zone"] = json!(format!("{project}/{place}"));
        }
        self.operations.insert(name, Operation { polls: 0, answer: answer.clone(), error });
        answer
    }

    fn wait(&mut self, name: &str) -> Result<Value, Refusal> {
        let operation = self.operations.get_mut(name).ok_or_else(|| not_found(name))?;
        operation.polls += 1;
        let mut answer = operation.answer.clone();
        if operation.polls > POLLS {
            answer["status"] = json!("DONE");
            if let Some((code, message)) = operation.error {
                answer["error"] = json!({"errors": [{"code": code, "message": message}]});
                answer["httpErrorStatusCode"] = json!(400);
            }
        }
        Ok(answer)
    }

    fn change(
        &mut self,
        change: &str,
        call: &Matched<'_>,
        query: &[(String, String)],
        body: Option<&Value>,
    ) -> Result<(), Refusal> {
        let invalid = |message: &str| Err((400, "invalid", message.to_owned()));
        let zone = call.get("zone");
        // One method calls the instance its resource.
        let name =
            if change.ends_with("DeletionProtection") { call.get("resource") } else { call.get("instance") };
        let instance = format!("instance {zone}/{name}");
        match (change, body) {
            ("compute.images.insert", Some(body)) => {
                let source = body["rawDisk"]["source"].as_str().unwrap_or_default();
                let (bucket, name) = super::storage::parse_source(source, &self.address)
                    .ok_or_else(|| (400, "invalid", format!("Invalid value for rawDisk.source: {source}")))?;
                let archive = self.objects.get(&(bucket, name)).cloned();
                let archive =
                    archive.ok_or_else(|| (404, "notFound", format!("The object {source} was not found")))?;
                // Later than any disk of a test, as an image is made after its disk.
                let more = json!({"status": "READY", "creationTimestamp": "2099-01-01T00:00:00.000-07:00"});
                self.insert("image", "", body, more)?;
                self.archives.insert(body["name"].as_str().unwrap_or_default().to_owned(), archive);
                Ok(())
            }
            ("compute.firewalls.insert", Some(body)) => self.insert("firewall", "", body, json!({})),
            ("compute.instances.insert", Some(body)) => self.insert_instance(call.get("project"), zone, body),
            ("compute.firewalls.patch", Some(body)) => {
                let key = format!("firewall {}", call.get("firewall"));
                let rule = self.resources.get_mut(&key).ok_or_else(|| not_found(&key))?;
                let members = body.as_object().into_iter().flatten();
                members.for_each(|(name, value)| rule[name] = value.clone());
                Ok(())
            }
            ("compute.instances.setTags", Some(body)) => {
                let machine = self.resources.get_mut(&instance).ok_or_else(|| not_found(&instance))?;
                if body["fingerprint"] != machine["tags"]["fingerprint"] {
                    return Err((412, "conditionNotMet", "Supplied fingerprint does not match".to_owned()));
                }
                self.counter += 1;
                machine["tags"] = json!({"items": body["items"], "fingerprint": fingerprint(self.counter)});
                Ok(())
            }
            ("compute.instances.setDeletionProtection", _) => {
                let machine = self.resources.get_mut(&instance).ok_or_else(|| not_found(&instance))?;
                let wanted = query.iter().find(|(key, _)| key == "deletionProtection");
                machine["deletionProtection"] = json!(wanted.is_none_or(|(_, value)| value == "true"));
                Ok(())
            }
            ("compute.instances.stop" | "compute.instances.start", _) => {
                let machine = self.resources.get_mut(&instance).ok_or_else(|| not_found(&instance))?;
                machine["status"] = json!(if change.ends_with("stop") { "TERMINATED" } else { "RUNNING" });
                Ok(())
            }
            ("compute.instances.delete", _) => {
                let machine = self.read(&instance)?;
                if machine["deletionProtection"] == json!(true) {
                    return invalid(
                        "Invalid resource usage: 'Resource cannot be deleted if it's protected against deletion.'",
                    );
                }
                for disk in machine["disks"].as_array().into_iter().flatten() {
                    if disk["autoDelete"] == json!(true) {
                        let name =
                            disk["initializeParams"]["diskName"].as_str().unwrap_or(call.get("instance"));
                        self.resources.remove(&format!("disk {zone}/{name}"));
                    }
                }
                self.resources.remove(&instance);
                self.consoles.remove(call.get("instance"));
                Ok(())
            }
            ("compute.images.delete", _) => self.delete(&format!("image {}", call.get("image"))),
            ("compute.firewalls.delete", _) => self.delete(&format!("firewall {}", call.get("firewall"))),
            ("compute.disks.delete", _) => {
                let key = format!("disk {zone}/{}", call.get("disk"));
                match self.read(&key)?["users"].as_array().is_some_and(|users| !users.is_empty()) {
                    true => invalid("The disk resource is already being used"),
                    false => self.delete(&key),
                }
            }
            _ => invalid("the body is missing"),
        }
    }

    fn delete(&mut self, key: &str) -> Result<(), Refusal> {
        self.resources.remove(key).map(|_| ()).ok_or_else(|| not_found(key))
    }

    fn insert(&mut self, kind: &str, place: &str, body: &Value, more: Value) -> Result<(), Refusal> {
        let name = body["name"].as_str().unwrap_or_default();
        let key = format!("{kind} {place}{name}");
        if self.resources.contains_key(&key) {
            return Err((409, "alreadyExists", format!("The resource '{key}' already exists")));
        }
        let mut resource = body.clone();
        more.as_object().into_iter().flatten().for_each(|(name, value)| resource[name] = value.clone());
        self.resources.insert(key, resource);
        Ok(())
    }

    /// Checks what the discovery document does not say: images must exist, the boot image must run in TDX.
    fn insert_instance(&mut self, project: &str, zone: &str, body: &Value) -> Result<(), Refusal> {
        let invalid = |message: String| (400, "invalid", message);
        let place = format!("{zone}/");
        let name = body["name"].as_str().unwrap_or_default().to_owned();
        let disks = body["disks"].as_array().cloned().unwrap_or_default();
        for disk in &disks {
            let source = disk["initializeParams"]["sourceImage"].as_str().unwrap_or_default();
            let image = source.rsplit('/').next().unwrap_or_default();
            let image = self.resources.get(&format!("image {image}")).ok_or_else(|| not_found(source))?;
            let features = image["guestOsFeatures"].as_array().cloned().unwrap_or_default();
            let tdx = features.iter().any(|feature| feature["type"] == "TDX_CAPABLE");
            if disk["boot"] == json!(true) && !tdx {
                let message =
                    "Confidential Instance Config can only be set when using a TDX compatible image";
                return Err(invalid(message.to_owned()));
            }
        }
        if body["scheduling"]["onHostMaintenance"] != "TERMINATE" {
            return Err(invalid("Confidential VMs require onHostMaintenance TERMINATE".to_owned()));
        }
        self.counter += 1;
        let mut interfaces = body["networkInterfaces"].clone();
        for interface in interfaces.as_array_mut().into_iter().flatten() {
            interface["networkIP"] = json!("10.128.0.2");
            for config in interface["accessConfigs"].as_array_mut().into_iter().flatten() {
                config["natIP"] = json!(self.external_address);
            }
        }
        let tags = json!({"items": body["tags"]["items"], "fingerprint": fingerprint(self.counter)});
        let more = json!({
            "id": self.counter.to_string(),
            "status": "RUNNING",
            "zone": format!("{}projects/{project}/zones/{zone}", self.address),
            "selfLink": format!("{}projects/{project}/zones/{zone}/instances/{name}", self.address),
            "creationTimestamp": "2026-11-20T12:00:00.000-07:00",
            "networkInterfaces": interfaces,
            "tags": tags,
        });
        self.insert("instance", &place, body, more)?;
        let said = self.boot_text.clone();
        self.print(&name, &said);
        for disk in disks {
            let disk = disk["initializeParams"]["diskName"].as_str().unwrap_or(&name).to_owned();
            // A disk of this name that exists already is attached as it is: Google does so too.
            let entry = self.resources.entry(format!("disk {place}{disk}"));
            entry.or_insert_with(|| json!({"name": disk}))["users"] =
                json!([format!("zones/{zone}/instances/{name}")]);
        }
        Ok(())
    }

    pub(super) fn insert_bucket(&mut self, body: &Value) -> Result<Value, Refusal> {
        let answer = json!({"name": body["name"]});
        match self.insert("bucket", "", body, json!({})) {
            Ok(()) => Ok(answer),
            Err((status, _, message)) => Err((status, "conflict", message)),
        }
    }

    pub(super) fn bucket(&self, name: &str) -> Result<Value, Refusal> {
        self.read(&format!("bucket {name}"))
    }
}

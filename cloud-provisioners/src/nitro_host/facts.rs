//! What a host is like, asked in one step.

use std::collections::HashMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::allocator::{Allocator, Problem, cpu_list};
use super::nitro::Enclave;

/// Prints one `key value` a line; what may have several lines is in base64. It changes nothing.
pub(super) const PROBE: &str = r#"
say() { printf '%s %s\n' "$1" "$2"; }
many() { printf '%s ' "$1"; base64 -w0; echo; }
word() { "$@" 2>/dev/null | head -n 1; }
. /etc/os-release
say os "${ID:-unknown} ${VERSION_ID:-}"
say arch "$(uname -m)"
say kernel "$(uname -r)"
say boot_id "$(cat /proc/sys/kernel/random/boot_id)"
for file in /lib/modules/*/kernel/drivers/virt/nitro_enclaves/nitro_enclaves.ko*; do
  [ -e "$file" ] && say module "$(echo "$file" | cut -d/ -f4)"
done
say cpus "$(cat /sys/devices/system/cpu/present)"
say siblings "$(cat /sys/devices/system/cpu/cpu0/topology/thread_siblings_list)"
say memory_kib "$(awk '/^MemTotal:/ { print $2 }' /proc/meminfo)"
say disk_kib "$(df -Pk /home | awk 'NR == 2 { print $4 }')"
command -v nitro-cli >/dev/null && say nitro_cli "$(word nitro-cli --version)"
[ -d /sys/module/nitro_enclaves ] && say module_loaded yes
[ -e /dev/nitro_enclaves ] && say device yes
[ -e /sys/module/nitro_enclaves/parameters/ne_cpus ] &&
  say pool "$(cat /sys/module/nitro_enclaves/parameters/ne_cpus)"
[ -e /etc/nitro_enclaves/allocator.yaml ] && many allocator < /etc/nitro_enclaves/allocator.yaml
say allocator_active "$(word systemctl is-active nitro-enclaves-allocator.service)"
say allocator_enabled "$(word systemctl is-enabled nitro-enclaves-allocator.service)"
journalctl -u nitro-enclaves-allocator.service -b -n 20 -o cat --no-pager 2>/dev/null | many allocator_log
for pages in /sys/kernel/mm/hugepages/hugepages-*kB; do
  [ -e "$pages/free_hugepages" ] &&
    say hugepages "${pages##*hugepages-} $(cat "$pages/free_hugepages") $(cat "$pages/nr_hugepages")"
done
command -v nitro-cli >/dev/null && [ -e /dev/nitro_enclaves ] && nitro-cli describe-enclaves 2>/dev/null | many enclaves
[ -e /usr/local/bin/host-proxy ] && say proxy_sha256 "$(sha256sum /usr/local/bin/host-proxy | cut -d' ' -f1)"
[ -e /etc/systemd/system/host-proxy.service ] &&
  say proxy_unit_sha256 "$(sha256sum /etc/systemd/system/host-proxy.service | cut -d' ' -f1)"
[ -e /etc/host-proxy.toml ] && say proxy_config "$(head -n 1 /etc/host-proxy.toml)"
say proxy_active "$(word systemctl is-active host-proxy.service)"
exit 0
"#;

/// What a host is like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Distribution and version, `amzn 2023`.
    pub os: String,
    /// Architecture, `x86_64`.
    pub arch: String,
    /// The kernel that runs.
    pub kernel: String,
    /// Changes with every start of the machine.
    pub boot_id: String,
    /// Installed kernels that have the enclaves' module.
    pub modules: Vec<String>,
    /// Processors of the machine, offline ones too.
    pub cpus: u32,
    /// Threads of one core.
    pub threads_per_core: u32,
    /// Memory of the machine in MiB.
    pub memory_mib: u64,
    /// What is free where images are put, in MiB.
    pub disk_free_mib: u64,
    /// Version of nitro-cli, if it is installed.
    pub nitro_cli: Option<String>,
    /// Whether the kernel module is loaded.
    pub module_loaded: bool,
    /// Whether `/dev/nitro_enclaves` is there.
    pub device: bool,
    /// Processors that are set aside; nothing where the module has no say.
    pub pool: Vec<u32>,
    /// The allocator's file, if there is one.
    pub allocator: Option<Result<Allocator, Problem>>,
    /// State of the allocator's unit, `active`.
    pub allocator_active: String,
    /// Whether it starts with the machine, `enabled`.
    pub allocator_enabled: String,
    /// What it last said.
    pub allocator_log: String,
    /// Memory in free hugepages, in MiB.
    pub free_hugepages_mib: u64,
    /// Memory in all hugepages, in MiB.
    pub hugepages_mib: u64,
    /// What runs.
    pub enclaves: Vec<Enclave>,
    /// Digest of the installed proxy.
    pub proxy_sha256: Option<String>,
    /// Digest of its unit.
    pub proxy_unit_sha256: Option<String>,
    /// The first line of its configuration, which says who wrote it.
    pub proxy_config: Option<String>,
    /// State of its unit.
    pub proxy_active: String,
}

impl Facts {
    /// Reads what the probe printed.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut one: HashMap<&str, &str> = HashMap::new();
        let mut facts = Self::default();
        for line in text.lines() {
            let (key, value) = line.split_once(' ').unwrap_or((line, ""));
            let value = value.trim();
            match key {
                "module" => facts.modules.push(value.to_owned()),
                "hugepages" => facts.hugepages(value).ok_or_else(|| format!("hugepages are {value:?}"))?,
                "enclaves" => {
                    let json = decoded(value)?;
                    facts.enclaves = serde_json::from_str(&json)
                        .map_err(|error| format!("nitro-cli describe-enclaves: {error}"))?;
                }
                "allocator" => facts.allocator = Some(Allocator::parse(&decoded(value)?)),
                "allocator_log" => facts.allocator_log = decoded(value)?,
                _ => drop(one.insert(key, value)),
            }
        }
        let text = |key: &str| one.get(key).map(|value| (*value).to_owned());
        let needed = |key: &str| {
            text(key).filter(|value| !value.is_empty()).ok_or_else(|| format!("does not say its {key}"))
        };
        let number = |key: &str| {
            let value = needed(key)?;
            value.parse::<u64>().map_err(|_| format!("{key} is {value:?}"))
        };
        let list = |key: &str| {
            let value = needed(key)?;
            let ids = cpu_list(&value).filter(|ids| !ids.is_empty());
            ids.ok_or_else(|| format!("{key} is {value:?}"))
        };
        let count = |ids: Vec<u32>| u32::try_from(ids.len()).unwrap_or(u32::MAX);
        Ok(Self {
            os: needed("os")?,
            arch: needed("arch")?,
            kernel: needed("kernel")?,
            boot_id: needed("boot_id")?,
            cpus: count(list("cpus")?),
            threads_per_core: count(list("siblings")?),
            memory_mib: number("memory_kib")? / 1024,
            disk_free_mib: number("disk_kib")? / 1024,
            nitro_cli: text("nitro_cli"),
            module_loaded: one.contains_key("module_loaded"),
            device: one.contains_key("device"),
            pool: text("pool").and_then(|ids| cpu_list(&ids)).unwrap_or_default(),
            allocator_active: text("allocator_active").unwrap_or_default(),
            allocator_enabled: text("allocator_enabled").unwrap_or_default(),
            proxy_sha256: text("proxy_sha256"),
            proxy_unit_sha256: text("proxy_unit_sha256"),
            proxy_config: text("proxy_config"),
            proxy_active: text("proxy_active").unwrap_or_default(),
            ..facts
        })
    }

    /// Takes `2048kB FREE ALL`.
    fn hugepages(&mut self, value: &str) -> Option<()> {
        let mut words = value.split(' ');
        let kib: u64 = words.next()?.strip_suffix("kB")?.parse().ok()?;
        let mut mib = || words.next()?.parse::<u64>().ok()?.checked_mul(kib).map(|kib| kib / 1024);
        let (free, all) = (mib()?, mib()?);
        self.free_hugepages_mib = self.free_hugepages_mib.saturating_add(free);
        self.hugepages_mib = self.hugepages_mib.saturating_add(all);
        Some(())
    }

    /// Whether the kernel that runs has the module.
    pub(super) fn has_module(&self) -> bool {
        self.modules.contains(&self.kernel)
    }
}

fn decoded(base64: &str) -> Result<String, String> {
    let bytes = STANDARD.decode(base64).map_err(|error| format!("not base64: {error}"))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// What the probe prints on a c5.xlarge that was set up, with an enclave that runs.
    pub(in crate::nitro_host) const READY: &str = "os amzn 2023\narch x86_64\nkernel 6.1.150-174.273.amzn2023.x86_64\n\
        boot_id 3bfe9b0a-6c3e-4a39-9a3c-1d2b8d9e7a51\nmodule 6.1.150-174.273.amzn2023.x86_64\ncpus 0-3\n\
        siblings 0,2\nmemory_kib 7864320\ndisk_kib 15728640\nnitro_cli Nitro CLI 1.4.2\nmodule_loaded yes\n\
        device yes\npool 1,3\nallocator LS0tCm1lbW9yeV9taWI6IDUxMgpjcHVfY291bnQ6IDIK\nallocator_active active\n\
        allocator_enabled enabled\nallocator_log \nhugepages 1048576kB 0 0\nhugepages 2048kB 256 256\nenclaves W10=\n\
        proxy_active active\nproxy_sha256 aa\nproxy_unit_sha256 bb\nproxy_config # x\n";

    #[test]
    fn what_the_probe_prints_is_read() {
        let facts = Facts::parse(READY).unwrap();
        assert_eq!((facts.cpus, facts.threads_per_core, facts.pool.as_slice()), (4, 2, &[1, 3][..]));
        assert_eq!((facts.memory_mib, facts.free_hugepages_mib), (7680, 512));
        assert_eq!(facts.allocator.unwrap().unwrap().memory_mib, 512);
        assert_eq!(facts.enclaves, []);
    }

    #[test]
    fn an_answer_without_its_essentials_is_named() {
        for (line, problem) in [
            ("cpus 0-3", "does not say its cpus"),
            ("memory_kib 7864320", "does not say its memory_kib"),
            ("boot_id 3bfe9b0a-6c3e-4a39-9a3c-1d2b8d9e7a51", "does not say its boot_id"),
        ] {
            assert_eq!(Facts::parse(&READY.replace(line, "")), Err(problem.to_owned()));
        }
        assert!(Facts::parse(&READY.replace("W10=", "e30=")).unwrap_err().starts_with("nitro-cli"));
        assert!(Facts::parse(&READY.replace("2048kB 256", "2048kB many")).is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_answer_is_too_strange(text: String) {
            let _read_or_refused = Facts::parse(&format!("{READY}\n{text}"));
            let _read_or_refused = Facts::parse(&text);
        }
    }
}

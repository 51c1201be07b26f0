//! The command lines of the programs we start. Pure: what goes in decides what comes out.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::Path;

use crate::Error;
use crate::machine::{Accelerator, GuestCid, Memory};

/// What QEMU is told.
#[derive(Debug)]
pub(crate) struct Qemu<'a> {
    /// For people who look at a list of processes.
    pub(crate) name: &'a str,
    pub(crate) firmware: &'a Path,
    pub(crate) memory: Memory,
    pub(crate) cpus: u8,
    pub(crate) accelerator: Accelerator,
    /// Descriptor of the connection to vhost-device-vsock.
    pub(crate) vsock: RawFd,
    pub(crate) boot: Boot<'a>,
}

#[derive(Debug)]
pub(crate) enum Boot<'a> {
    /// Descriptors of kernel and ramdisks, the whole command line, the connection to our NSM and QEMU's name for a
    /// device that such a connection implements.
    Microvm { kernel: RawFd, ramdisks: RawFd, command_line: &'a str, nsm: RawFd, nsm_device: &'a str },
    /// The image file, what to append to its command line, and what PCR3 and PCR4 are made from.
    NitroEnclave { image: &'a Path, append: &'a str, role: Option<&'a str>, instance: Option<&'a str> },
}

/// QEMU's arguments.
pub(crate) fn qemu(machine: &Qemu<'_>) -> Vec<OsString> {
    let mut arguments = List::default();
    arguments.words("-no-user-config -nodefaults -display none -monitor none -no-reboot");
    match machine.accelerator {
        // QEMU takes the first that works.
        Accelerator::Auto => arguments.words("-accel kvm -accel tcg"),
        Accelerator::Kvm => arguments.words("-accel kvm"),
        Accelerator::Tcg => arguments.words("-accel tcg"),
    };
    arguments.pair("-name", format!("enclave-{}", machine.name)).words("-cpu max");
    arguments.pair("-smp", machine.cpus.to_string()).pair("-m", format!("{}M", machine.memory.mib()));
    arguments.pair("-L", machine.firmware);
    // Standard input is /dev/null: an enclave's console cannot be typed into.
    arguments.words("-chardev stdio,id=console,signal=off -serial chardev:console");
    arguments.pair("-chardev", format!("socket,id=vsock,fd={}", machine.vsock));
    match &machine.boot {
        Boot::Microvm { kernel, ramdisks, command_line, nsm, nsm_device } => {
            let memory = format!("memory-backend-memfd,id=memory,size={}M,share=on", machine.memory.mib());
            arguments.pair("-object", memory);
            // Without acpi=off the command line gets no descriptions of the devices, and enclave kernels know no
            // other way to find them.
            let microvm =
                "microvm,acpi=off,pit=on,pic=on,isa-serial=on,auto-kernel-cmdline=on,memory-backend=memory";
            arguments.pair("-machine", microvm);
            arguments.words("-device vhost-user-vsock-device,chardev=vsock");
            arguments.pair("-chardev", format!("socket,id=nsm,fd={nsm}"));
            let device = format!("{nsm_device},virtio-id=33,num_vqs=1,vq_size=64,config_size=0,chardev=nsm");
            arguments.pair("-device", device);
            arguments.pair("-kernel", descriptor(*kernel)).pair("-initrd", descriptor(*ramdisks));
            arguments.pair("-append", *command_line);
        }
        Boot::NitroEnclave { image, append, role, instance } => {
            let mut device = "nitro-enclave,vsock=vsock,id=keyferry".to_owned();
            for (option, value) in [("parent-role", role), ("parent-id", instance)] {
                if let Some(value) = value {
                    device.push_str(&format!(",{option}={}", value.replace(',', ",,")));
                }
            }
            arguments.pair("-machine", device).pair("-kernel", *image).pair("-append", *append);
        }
    }
    arguments.0
}

/// Arguments of vhost-device-vsock: it listens on `socket` for QEMU, on `paths` for connections into the guest, and
/// connects to `paths` followed by `_` and the port for connections out of it.
pub(crate) fn vsock(cid: GuestCid, socket: &Path, paths: &Path) -> Result<Vec<OsString>, Error> {
    let (socket, paths) = (plain(socket)?, plain(paths)?);
    let vm = format!("guest-cid={},socket={socket},uds-path={paths}", cid.get());
    Ok(vec!["--vm".into(), vm.into()])
}

/// How a process names a file it inherited.
fn descriptor(number: RawFd) -> String {
    format!("/proc/self/fd/{number}")
}

/// vhost-device-vsock splits its argument at commas and has no way to quote one.
fn plain(path: &Path) -> Result<&str, Error> {
    let bad = |what| Error::Path { path: path.to_owned(), what };
    let text = path.to_str().ok_or_else(|| bad("bytes that are not UTF-8"))?;
    if text.contains([',', '=']) { Err(bad("a comma or an equals sign")) } else { Ok(text) }
}

#[derive(Default)]
struct List(Vec<OsString>);

impl List {
    fn words(&mut self, words: &str) -> &mut Self {
        self.0.extend(words.split(' ').map(OsString::from));
        self
    }

    fn pair(&mut self, option: &str, value: impl AsRef<std::ffi::OsStr>) -> &mut Self {
        self.0.push(option.into());
        self.0.push(value.as_ref().to_owned());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(arguments: &[OsString]) -> String {
        let words: Vec<_> = arguments.iter().map(|word| word.to_str().unwrap()).collect();
        words.join(" ").replace(" -", "\n-")
    }

    fn machine(boot: Boot<'_>) -> Qemu<'_> {
        Qemu {
            name: "app",
            firmware: Path::new("/usr/share/qemu"),
            memory: Memory::from_mib(512),
            cpus: 2,
            accelerator: Accelerator::Auto,
            vsock: 7,
            boot,
        }
    }

    #[test]
    fn a_microvm_gets_our_nsm_and_shared_memory() {
        let boot = Boot::Microvm {
            kernel: 4,
            ramdisks: 5,
            command_line: "console=ttyS0, reboot=t",
            nsm: 6,
            nsm_device: "vhost-user-test-device",
        };
        insta::assert_snapshot!(text(&qemu(&machine(boot))));
    }

    #[test]
    fn a_nitro_enclave_gets_the_image_and_its_parents_names() {
        let boot = Boot::NitroEnclave {
            image: Path::new("/images/a, b.eif"),
            append: "reboot=t no_timer_check keyferry.parent_cid=2",
            role: Some("arn:aws:iam::1:role/a,b"),
            instance: Some("i-1"),
        };
        insta::assert_snapshot!(text(&qemu(&machine(boot))));
    }

    #[test]
    fn vsock_paths_are_passed_on_as_they_are_or_not_at_all() {
        let cid = GuestCid::default();
        let arguments = vsock(cid, Path::new("/run/a b/s"), Path::new("/run/v")).unwrap();
        assert_eq!(text(&arguments), "--vm guest-cid=16,socket=/run/a b/s,uds-path=/run/v");
        for bad in ["/run/a,b", "/run/a=b"] {
            assert!(matches!(vsock(cid, Path::new(bad), Path::new("/run/v")), Err(Error::Path { .. })));
        }
    }
}

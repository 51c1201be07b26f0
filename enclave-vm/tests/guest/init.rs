//! The only program in the guest of the boot tests: built on the spot with nothing but the standard library, linked
//! statically, run as /init. It asks the NSM, talks to the host over vsock, prints what it got, and does what the
//! word `test=` on the kernel command line says: `restart` (the default), `halt`, `panic` or `wait`.

use std::ffi::{CString, c_char, c_int, c_ulong, c_void};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr;

unsafe extern "C" {
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    fn ioctl(descriptor: c_int, request: c_ulong, ...) -> c_int;
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn connect(descriptor: c_int, address: *const c_void, len: u32) -> c_int;
    fn reboot(command: c_int) -> c_int;
}

/// `_IOWR(0x0A, 0, 32)`.
const NSM_REQUEST: c_ulong = 0xC020_0A00;
const AF_VSOCK: c_int = 40;
const SOCK_STREAM: c_int = 1;
const RESTART: c_int = 0x0123_4567;
const HALT: c_int = 0xCDEF_0123_u32 as c_int;
/// The port that the host's side of the test listens on.
const PORT: u32 = 9100;
/// Most that the driver has room for.
const RESPONSE: usize = 0x3000;

#[repr(C)]
struct Message {
    request: *const u8,
    request_len: u64,
    response: *mut u8,
    response_len: u64,
}

#[repr(C)]
struct VsockAddress {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u8,
    zero: [u8; 3],
}

fn main() {
    for (kind, target) in [("devtmpfs", "/dev"), ("proc", "/proc")] {
        attach(kind, target);
    }
    let command_line = fs::read_to_string("/proc/cmdline").unwrap();
    println!("guest: command line {}", command_line.trim());
    let word = |key: &str| command_line.split_whitespace().find_map(|word| word.strip_prefix(key).map(str::to_owned));
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap().matches("processor\t").count();
    println!("guest: cpus {cpus}");

    let nsm = File::options().read(true).write(true).open("/dev/nsm").unwrap();
    for index in 0..3 {
        let request = [b"\xa1\x6bDescribePCR\xa1\x65index".as_slice(), &[index]].concat();
        println!("guest: pcr{index} {}", hex(&ask(&nsm, &request).unwrap()));
    }
    // {"Attestation": {"user_data": "asked in the guest", "nonce": null, "public_key": null}}
    let request = b"\xa1\x6bAttestation\xa3\x69user_data\x52asked in the guest\x65nonce\xf6\x6apublic_key\xf6";
    println!("guest: document {}", hex(&ask(&nsm, request).unwrap()));
    println!("guest: nonsense {}", hex(&ask(&nsm, b"\xff").unwrap()));
    println!("guest: long {:?}", ask(&nsm, &[0; 0x1001]).map(|_| ()));
    for _ in 0..200 {
        assert!(ask(&nsm, b"\x69GetRandom").unwrap().len() > 256);
    }
    println!("guest: random 200");
    if word("test.vsock=").is_some() {
        talk(word("keyferry.parent_cid=").unwrap().parse().unwrap());
    }
    println!("guest: ready");
    match word("test=").as_deref() {
        Some("wait") => loop {
            std::thread::park();
        },
        Some("panic") => std::process::exit(7),
        Some("halt") => assert_eq!(unsafe { reboot(HALT) }, 0),
        _ => assert_eq!(unsafe { reboot(RESTART) }, 0),
    }
}

fn attach(kind: &str, target: &str) {
    fs::create_dir_all(target).unwrap();
    let (kind, target) = (CString::new(kind).unwrap(), CString::new(target).unwrap());
    let mounted = unsafe { mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, ptr::null()) };
    assert_eq!(mounted, 0, "{}", std::io::Error::last_os_error());
}

fn ask(nsm: &File, request: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut response = vec![0; RESPONSE];
    let mut message = Message {
        request: request.as_ptr(),
        request_len: request.len() as u64,
        response: response.as_mut_ptr(),
        response_len: RESPONSE as u64,
    };
    if unsafe { ioctl(nsm.as_raw_fd(), NSM_REQUEST, &raw mut message) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    response.truncate(message.response_len as usize);
    Ok(response)
}

/// Sends the host a line and prints the one that comes back.
fn talk(cid: u32) {
    let address = VsockAddress { family: AF_VSOCK as u16, reserved: 0, port: PORT, cid, flags: 0, zero: [0; 3] };
    let mut stream = unsafe {
        let descriptor = socket(AF_VSOCK, SOCK_STREAM, 0);
        assert!(descriptor >= 0, "{}", std::io::Error::last_os_error());
        let connected = connect(descriptor, (&raw const address).cast(), size_of::<VsockAddress>() as u32);
        assert_eq!(connected, 0, "{}", std::io::Error::last_os_error());
        File::from_raw_fd(descriptor)
    };
    stream.write_all(b"hello from the guest\n").unwrap();
    let mut answer = Vec::new();
    let mut byte = [0];
    while byte != *b"\n" && stream.read(&mut byte).unwrap() == 1 {
        answer.push(byte[0]);
    }
    println!("guest: vsock {}", String::from_utf8(answer).unwrap().trim());
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

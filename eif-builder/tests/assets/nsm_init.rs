//! An init that prints what the NSM reports, and nothing else. Built by tests/qemu.rs with plain rustc, static.

use std::ffi::{c_char, c_int, c_ulong, c_void};
use std::fs::File;
use std::os::fd::AsRawFd;

unsafe extern "C" {
    fn mount(source: *const c_char, target: *const c_char, kind: *const c_char, flags: c_ulong, data: *const c_void) -> c_int;
    fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int;
}

/// `_IOWR(0x0A, 0, 32)` of the NSM driver, and its argument.
const NSM_REQUEST: c_ulong = 0xC020_0A00;

#[repr(C)]
struct Message {
    request: *const u8,
    request_len: u64,
    response: *mut u8,
    response_len: u64,
}

fn main() {
    // SAFETY: all strings end in a zero byte; devtmpfs takes no data.
    unsafe { mount(c"dev".as_ptr(), c"/dev".as_ptr(), c"devtmpfs".as_ptr(), 0, std::ptr::null()) };
    match File::options().read(true).write(true).open("/dev/nsm") {
        Err(error) => println!("NSM MISSING {error}"),
        Ok(device) => (0..16).for_each(|index| println!("NSM PCR{index} {}", describe(&device, index))),
    }
    println!("NSM DONE");
    loop {
        std::thread::park();
    }
}

/// `{"DescribePCR": {"index": n}}`; the answer has the value as a byte string of 48.
fn describe(device: &File, index: u8) -> String {
    let mut request = b"\xa1\x6bDescribePCR\xa1\x65index".to_vec();
    request.push(index);
    let mut response = vec![0_u8; 0x3000];
    let mut message = Message {
        request: request.as_ptr(),
        request_len: request.len() as u64,
        response: response.as_mut_ptr(),
        response_len: response.len() as u64,
    };
    // SAFETY: both buffers outlive the call and have the lengths given.
    let result = unsafe { ioctl(device.as_raw_fd(), NSM_REQUEST, std::ptr::from_mut(&mut message).cast()) };
    if result != 0 {
        return format!("ERROR {}", std::io::Error::last_os_error());
    }
    let start = response.windows(2).position(|pair| pair == [0x58, 48]).map_or(0, |at| at + 2);
    response[start..start + 48].iter().map(|byte| format!("{byte:02x}")).collect()
}

//! What kind of address an address is: which of them a name may lead to, and which only a rule can open.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// The kind of an address, as far as the allow-list cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AddressClass {
    /// An ordinary destination: a name may resolve to it. The documentation ranges count as ordinary, for nothing
    /// answers there.
    Public,
    /// A cloud's metadata or credentials service, such as 169.254.169.254.
    Metadata,
    /// 127.0.0.0/8 and ::1.
    Loopback,
    /// 169.254.0.0/16 and fe80::/10.
    LinkLocal,
    /// RFC 1918, unique local (fc00::/7) and the old site-local (fec0::/10).
    Private,
    /// 100.64.0.0/10: carrier-grade NAT, used inside VPCs and by overlay networks.
    Shared,
    /// 224.0.0.0/4 and ff00::/8.
    Multicast,
    /// 0.0.0.0/8 and ::, which the kernel takes for this machine.
    Unspecified,
    /// Ranges that carry an IPv4 address to a translator: NAT64, 6to4, Teredo. What is reached is not what is read.
    Translated,
    /// A translated address whose inner IPv4 address is not public.
    TranslatedSpecial,
    /// Everything that is not handed out for use: 240.0.0.0/4, benchmarking, protocol assignments, IPv6 outside
    /// 2000::/3.
    Reserved,
    /// An address of this machine itself, whatever its range.
    Own,
}

impl AddressClass {
    /// Stable name for logs, metrics and `explain`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Public => "public",
            Self::Metadata => "metadata",
            Self::Loopback => "loopback",
            Self::LinkLocal => "link-local",
            Self::Private => "private",
            Self::Shared => "shared",
            Self::Multicast => "multicast",
            Self::Unspecified => "unspecified",
            Self::Translated => "translated",
            Self::TranslatedSpecial => "translated-special",
            Self::Reserved => "reserved",
            Self::Own => "own",
        }
    }

    /// Whether only a rule with exactly this address opens it; a range that contains it does not.
    pub(crate) fn needs_exact_rule(self) -> bool {
        matches!(self, Self::Metadata | Self::TranslatedSpecial | Self::Own)
    }
}

impl fmt::Display for AddressClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The address without the IPv6 clothes of an IPv4 address: `::ffff:a.b.c.d` connects to a.b.c.d, so it is judged as
/// that.
pub fn canonical(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(address, IpAddr::V4),
        IpAddr::V4(_) => address,
    }
}

/// The class of an address. It knows nothing of this machine, so it never answers [`AddressClass::Own`].
pub fn classify(address: IpAddr) -> AddressClass {
    let address = canonical(address);
    match block_of(address) {
        Some((net, AddressClass::Translated)) => translated(net, address),
        Some((_, class)) => class,
        None => match address {
            IpAddr::V4(_) => AddressClass::Public,
            IpAddr::V6(v6) if GLOBAL_UNICAST.contains(&v6) => AddressClass::Public,
            IpAddr::V6(_) => AddressClass::Reserved,
        },
    }
}

/// The class of an address on this machine; `is_own` says whether an address is one of this machine's.
pub(crate) fn classify_here(address: IpAddr, is_own: impl Fn(IpAddr) -> bool) -> AddressClass {
    match classify(address) {
        // Loopback and metadata are what they are on every machine; asking about the others costs a system call.
        class @ (AddressClass::Loopback | AddressClass::Metadata | AddressClass::Unspecified) => class,
        _ if is_own(address) => AddressClass::Own,
        class => class,
    }
}

/// Whether a rule's range lies within the one special block the address lies in. Only such a rule was written with
/// that block in mind; `0.0.0.0/0` contains the loopback without naming it.
pub(crate) fn names(rule: IpNet, address: IpAddr) -> bool {
    let address = canonical(address);
    if !rule.contains(&address) {
        return false;
    }
    let exact = rule.prefix_len() == rule.max_prefix_len();
    exact || block_of(address).is_some_and(|(block, _)| block.contains(&rule))
}

fn translated(net: IpNet, address: IpAddr) -> AddressClass {
    let IpAddr::V6(v6) = address else { return AddressClass::Translated };
    let [_, a, b, .., y, z] = v6.segments();
    let inner = match net {
        net if net == IpNet::V6(NAT64) => join(y, z),
        net if net == IpNet::V6(SIX_TO_FOUR) => join(a, b),
        // Teredo hides the client's address by inverting it (RFC 4380 §4).
        net if net == IpNet::V6(TEREDO) => join(!y, !z),
        _ => return AddressClass::Translated,
    };
    match classify(IpAddr::V4(inner)) {
        AddressClass::Public => AddressClass::Translated,
        _ => AddressClass::TranslatedSpecial,
    }
}

fn join(high: u16, low: u16) -> Ipv4Addr {
    Ipv4Addr::from((u32::from(high) << 16) | u32::from(low))
}

fn block_of(address: IpAddr) -> Option<(IpNet, AddressClass)> {
    BLOCKS.iter().find(|(net, _)| net.contains(&address)).copied()
}

const fn v4(a: u8, b: u8, c: u8, d: u8, len: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), len))
}

const fn net6(segments: [u16; 8], len: u8) -> Ipv6Net {
    let [a, b, c, d, e, f, g, h] = segments;
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, d, e, f, g, h), len)
}

const fn v6(segments: [u16; 8], len: u8) -> IpNet {
    IpNet::V6(net6(segments, len))
}

/// RFC 6052 §2.1.
const NAT64: Ipv6Net = net6([0x64, 0xff9b, 0, 0, 0, 0, 0, 0], 96);
/// RFC 3056.
const SIX_TO_FOUR: Ipv6Net = net6([0x2002, 0, 0, 0, 0, 0, 0, 0], 16);
/// RFC 4380.
const TEREDO: Ipv6Net = net6([0x2001, 0, 0, 0, 0, 0, 0, 0], 32);
/// The only IPv6 space handed out so far (RFC 4291 §2.4).
const GLOBAL_UNICAST: Ipv6Net = net6([0x2000, 0, 0, 0, 0, 0, 0, 0], 3);

/// The special blocks, first match wins. From the IANA special-purpose registries (RFC 6890), and the metadata
/// services of the large clouds. A block starts at its own first address, so `names` can compare ranges.
const BLOCKS: [(IpNet, AddressClass); 38] = [
    // EC2 instance metadata, ECS and EKS credentials, EC2 metadata over IPv6.
    (v4(169, 254, 169, 254, 32), AddressClass::Metadata),
    (v4(169, 254, 170, 2, 32), AddressClass::Metadata),
    (v4(169, 254, 170, 23, 32), AddressClass::Metadata),
    (v6([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254], 128), AddressClass::Metadata),
    (v6([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23], 128), AddressClass::Metadata),
    // Azure's wire server, Alibaba's and Oracle's metadata service, Google's over IPv6.
    (v4(168, 63, 129, 16, 32), AddressClass::Metadata),
    (v4(100, 100, 100, 200, 32), AddressClass::Metadata),
    (v4(192, 0, 0, 192, 32), AddressClass::Metadata),
    (v6([0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254], 128), AddressClass::Metadata),
    (v4(0, 0, 0, 0, 8), AddressClass::Unspecified),
    (v4(10, 0, 0, 0, 8), AddressClass::Private),
    (v4(100, 64, 0, 0, 10), AddressClass::Shared),
    (v4(127, 0, 0, 0, 8), AddressClass::Loopback),
    (v4(169, 254, 0, 0, 16), AddressClass::LinkLocal),
    (v4(172, 16, 0, 0, 12), AddressClass::Private),
    (v4(192, 0, 0, 0, 24), AddressClass::Reserved),
    (v4(192, 88, 99, 0, 24), AddressClass::Reserved),
    (v4(192, 168, 0, 0, 16), AddressClass::Private),
    (v4(198, 18, 0, 0, 15), AddressClass::Reserved),
    (v4(224, 0, 0, 0, 4), AddressClass::Multicast),
    (v4(240, 0, 0, 0, 4), AddressClass::Reserved),
    (v6([0, 0, 0, 0, 0, 0, 0, 0], 128), AddressClass::Unspecified),
    (v6([0, 0, 0, 0, 0, 0, 0, 1], 128), AddressClass::Loopback),
    // IPv4-compatible, IPv4-mapped and IPv4-translated: no such packet belongs on a network (RFC 4291, RFC 2765).
    (v6([0, 0, 0, 0, 0, 0, 0, 0], 96), AddressClass::TranslatedSpecial),
    (v6([0, 0, 0, 0, 0, 0xffff, 0, 0], 96), AddressClass::TranslatedSpecial),
    (v6([0, 0, 0, 0, 0xffff, 0, 0, 0], 96), AddressClass::TranslatedSpecial),
    (IpNet::V6(NAT64), AddressClass::Translated),
    (v6([0x64, 0xff9b, 1, 0, 0, 0, 0, 0], 48), AddressClass::TranslatedSpecial),
    (v6([0x100, 0, 0, 0, 0, 0, 0, 0], 64), AddressClass::Reserved),
    (IpNet::V6(TEREDO), AddressClass::Translated),
    (v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 23), AddressClass::Reserved),
    (IpNet::V6(SIX_TO_FOUR), AddressClass::Translated),
    (v6([0x5f00, 0, 0, 0, 0, 0, 0, 0], 16), AddressClass::Reserved),
    (v6([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7), AddressClass::Private),
    (v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10), AddressClass::LinkLocal),
    (v6([0xfec0, 0, 0, 0, 0, 0, 0, 0], 10), AddressClass::Private),
    (v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8), AddressClass::Multicast),
    (v6([0x3ffe, 0, 0, 0, 0, 0, 0, 0], 16), AddressClass::Reserved),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_special_range_has_its_class() {
        use AddressClass::*;
        for (text, class) in [
            ("93.184.216.34", Public),
            ("203.0.113.7", Public),
            ("2606:4700::1111", Public),
            ("2001:db8::1", Public),
            ("169.254.169.254", Metadata),
            ("::ffff:169.254.169.254", Metadata),
            ("fd00:ec2::254", Metadata),
            ("168.63.129.16", Metadata),
            ("169.254.1.1", LinkLocal),
            ("fe80::1", LinkLocal),
            ("127.0.0.1", Loopback),
            ("127.255.255.254", Loopback),
            ("::1", Loopback),
            ("::ffff:127.0.0.1", Loopback),
            ("10.0.0.1", Private),
            ("172.31.255.255", Private),
            ("172.32.0.0", Public),
            ("192.168.0.1", Private),
            ("fc00::1", Private),
            ("fdff::1", Private),
            ("fec0::1", Private),
            ("100.64.0.1", Shared),
            ("100.128.0.1", Public),
            ("224.0.0.1", Multicast),
            ("ff02::1", Multicast),
            ("0.0.0.0", Unspecified),
            ("0.1.2.3", Unspecified),
            ("::", Unspecified),
            ("64:ff9b::5db8:d822", Translated),
            ("64:ff9b::a9fe:a9fe", TranslatedSpecial),
            ("64:ff9b:1::1", TranslatedSpecial),
            ("2002:5db8:d822::1", Translated),
            ("2002:7f00:1::1", TranslatedSpecial),
            // Teredo with the inverted loopback address.
            ("2001:0:4136:e378:8000:63bf:80ff:fffe", TranslatedSpecial),
            ("::7f00:1", TranslatedSpecial),
            ("::ffff:0:7f00:1", TranslatedSpecial),
            ("255.255.255.255", Reserved),
            ("240.0.0.1", Reserved),
            ("198.18.0.1", Reserved),
            ("4000::1", Reserved),
            ("100::1", Reserved),
        ] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(classify(address), class, "{text}");
        }
    }

    #[test]
    fn a_wide_range_names_no_special_address() {
        let names = |net: &str, address: &str| names(net.parse().unwrap(), address.parse().unwrap());
        assert!(names("127.0.0.1/32", "127.0.0.1"));
        assert!(names("127.0.0.0/8", "127.0.0.1"));
        assert!(names("10.1.0.0/16", "10.1.2.3"));
        assert!(!names("10.1.0.0/16", "10.2.0.1"));
        assert!(!names("0.0.0.0/0", "127.0.0.1"));
        assert!(!names("0.0.0.0/0", "10.0.0.1"));
        assert!(!names("0.0.0.0/1", "10.0.0.1"));
        assert!(!names("::/0", "::1"));
        assert!(!names("169.254.0.0/16", "169.254.169.254"), "the metadata address is a block of its own");
    }
}

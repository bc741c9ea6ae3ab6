//! The context of the cgroup hooks on sockets' addresses, and the two maps that only they use.
//!
//! The kernel refuses loads of the context that are narrower than its fields, which LLVM would make of a cast: all of
//! them are volatile.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{BPF_ANY, bpf_sock, bpf_sock_addr};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, LruHashMap};
use aya_ebpf::programs::SockAddrContext;
use mesh_common::addr::Ip6;
use mesh_common::be::{Be16, Be32};
use mesh_common::map::{DIALLED_MAX, Dialled, Host, PortKey};
use mesh_datapath::family::Family;
use mesh_datapath::socket::{
    Bound, DialledKey, Name, Socket, SocketAddrs, Sockets, dialled, dialled6, redirect, redirect6,
};
use mesh_datapath::tables::{AddrTables, Tables as _};

use crate::maps::Maps;

/// What each of these programs returns: the call goes on. Some hooks know no other value.
pub const PROCEED: i32 = 1;

/// Cookie of the node's network namespace.
#[map(name = "shoal_netns")]
static NETNS: Array<u64> = Array::pinned(1, 0);
#[map(name = "shoal_dialled")]
static DIALLED: LruHashMap<DialledKey, Dialled> = LruHashMap::pinned(DIALLED_MAX, 0);

impl Sockets for Maps {
    #[inline(always)]
    fn netns(&self) -> u64 {
        NETNS.get(0).copied().unwrap_or_default()
    }

    #[inline(always)]
    fn is_published(&self, key: &PortKey) -> bool {
        self.port(key).is_some()
    }

    #[inline(always)]
    fn dialled(&self, key: &DialledKey) -> Option<Dialled> {
        // SAFETY: The value is copied at once. A torn one would need two system calls on one unconnected socket that
        // send to one port at two addresses at the same time.
        unsafe { DIALLED.get(key) }.copied()
    }

    #[inline(always)]
    fn insert_dialled(&self, key: &DialledKey, dialled: &Dialled) {
        // Without it, the process is told the mesh address.
        let _ = DIALLED.insert(key, dialled, u64::from(BPF_ANY));
    }
}

impl<A: Family> SocketAddrs<A> for Maps
where
    Self: AddrTables<A>,
{
    #[inline(always)]
    fn is_local(&self, addr: &A) -> bool {
        AddrTables::<A>::is_local(self, addr)
    }

    #[inline(always)]
    fn host(&self) -> Option<&Host<A>> {
        self.config().map(A::host)
    }
}

/// A field of a context or of a socket.
macro_rules! field {
    ($of:ident.$($field:tt)+) => {
        // SAFETY: The pointer is valid while the program runs, and the verifier checks the offset.
        unsafe { (&raw const (*$of).$($field)+).read_volatile() }
    };
}

/// Writes a field of a context.
macro_rules! set_field {
    ($of:ident.$field:ident $([$i:literal])?, $value:expr) => {
        // SAFETY: As above.
        unsafe { (&raw mut (*$of).$field $([$i])?).write_volatile($value) }
    };
}

/// The four parts of an IPv6 address.
macro_rules! ip6 {
    ($of:ident.$field:ident) => {
        Ip6([
            be32(field!($of.$field[0])),
            be32(field!($of.$field[1])),
            be32(field!($of.$field[2])),
            be32(field!($of.$field[3])),
        ])
    };
}

/// `connect` on an IPv4 address.
#[inline(always)]
pub fn connect4(ctx: &SockAddrContext) {
    let sock = sock(ctx);
    lead4(ctx, be32(field!(sock.src_ip4)));
}

/// `connect` on an IPv6 address.
#[inline(always)]
pub fn connect6(ctx: &SockAddrContext) {
    let sock = sock(ctx);
    lead6(ctx, ip6!(sock.src_ip6));
}

/// A datagram to an IPv4 address.
#[inline(always)]
pub fn sendmsg4(ctx: &SockAddrContext) {
    let raw = ctx.sock_addr;
    lead4(ctx, be32(field!(raw.msg_src_ip4)));
}

/// A datagram to an IPv6 address. The kernel asks [`sendmsg4`] about a mapped one.
#[inline(always)]
pub fn sendmsg6(ctx: &SockAddrContext) {
    let raw = ctx.sock_addr;
    lead6(ctx, ip6!(raw.msg_src_ip6));
}

/// `getpeername`, or a datagram's sender, of an IPv4 socket.
#[inline(always)]
pub fn tell4(ctx: &SockAddrContext) {
    if let Some(addr) = dialled(&Maps, &socket(ctx), &name4(ctx)) {
        write4(ctx, addr);
    }
}

/// `getpeername`, or a datagram's sender, of an IPv6 socket.
#[inline(always)]
pub fn tell6(ctx: &SockAddrContext) {
    if let Some(addr) = dialled6(&Maps, &socket(ctx), &name6(ctx)) {
        write6(ctx, addr);
    }
}

#[inline(always)]
fn lead4(ctx: &SockAddrContext, from: Be32) {
    let bound = Bound { addr: from, ifindex: ifindex(ctx) };
    if let Some(addr) = redirect(&Maps, &socket(ctx), &bound, &name4(ctx)) {
        write4(ctx, addr);
    }
}

#[inline(always)]
fn lead6(ctx: &SockAddrContext, from: Ip6) {
    let bound = Bound { addr: from, ifindex: ifindex(ctx) };
    if let Some(addr) = redirect6(&Maps, &socket(ctx), &bound, &name6(ctx)) {
        write6(ctx, addr);
    }
}

#[inline(always)]
fn socket(ctx: &SockAddrContext) -> Socket {
    let raw = ctx.sock_addr;
    // SAFETY: A helper call with the program's own context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: As above.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // The lowest byte of IPPROTO_MPTCP is IPPROTO_TCP, and to clients of a port the one is as good as the other.
    Socket { netns, cookie, protocol: field!(raw.protocol) as u8 }
}

#[inline(always)]
fn sock(ctx: &SockAddrContext) -> *mut bpf_sock {
    let raw = ctx.sock_addr;
    field!(raw.__bindgen_anon_1.sk)
}

#[inline(always)]
fn ifindex(ctx: &SockAddrContext) -> u32 {
    let sock = sock(ctx);
    field!(sock.bound_dev_if)
}

#[inline(always)]
fn name4(ctx: &SockAddrContext) -> Name<Be32> {
    let raw = ctx.sock_addr;
    Name { addr: be32(field!(raw.user_ip4)), port: port(raw) }
}

#[inline(always)]
fn name6(ctx: &SockAddrContext) -> Name<Ip6> {
    let raw = ctx.sock_addr;
    Name { addr: ip6!(raw.user_ip6), port: port(raw) }
}

/// The port: two bytes on the wire, the first ones of the field.
#[inline(always)]
fn port(raw: *mut bpf_sock_addr) -> Be16 {
    let [high, low, ..] = field!(raw.user_port).to_ne_bytes();
    Be16::from_bytes([high, low])
}

#[inline(always)]
fn write4(ctx: &SockAddrContext, addr: Be32) {
    let raw = ctx.sock_addr;
    set_field!(raw.user_ip4, addr.raw());
}

#[inline(always)]
fn write6(ctx: &SockAddrContext, Ip6([a, b, c, d]): Ip6) {
    let raw = ctx.sock_addr;
    set_field!(raw.user_ip6[0], a.raw());
    set_field!(raw.user_ip6[1], b.raw());
    set_field!(raw.user_ip6[2], c.raw());
    set_field!(raw.user_ip6[3], d.raw());
}

#[inline(always)]
fn be32(raw: u32) -> Be32 {
    Be32::from_bytes(raw.to_ne_bytes())
}

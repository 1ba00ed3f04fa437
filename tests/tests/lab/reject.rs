//! Rejection: who sends into it is told at once, in the way asked for, and what it is told is well-formed on the
//! wire; what must not be answered is not.

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use nix::{
    cmsg_space,
    sys::socket::{
        ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt,
        sockopt::{Ipv4RecvErr, Ipv6RecvErr, UdpGsoSegment},
    },
};
use tests::lab::{
    capture::{Capture, Frame, Ip, Said, sum},
    frame::{ETH_QINQ, ETH_VLAN, Extension, Layer4, Packet, flag},
    injector::{Injector, RuleCounters},
    packet_socket::Sender,
    tcp,
    topology::{Lab, Node},
    transcript::report,
    trial::{Need, trial},
    tun::Tun,
    udp,
    wait::{wait_for, wait_until},
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector];
    const ETHTOOL: &[Need] = &[Need::Root, Need::Injector, Need::Tool("ethtool")];
    vec![
        trial(
            "reject::who_connects_is_refused_as_asked",
            NEEDS,
            who_connects_is_refused_as_asked,
        ),
        trial(
            "reject::an_answer_goes_to_the_sender_only",
            NEEDS,
            an_answer_goes_to_the_sender_only,
        ),
        trial(
            "reject::a_udp_sender_learns_of_what_became_of_its_datagram",
            NEEDS,
            a_udp_sender_learns_of_what_became_of_its_datagram,
        ),
        trial(
            "reject::connections_are_reset",
            NEEDS,
            connections_are_reset,
        ),
        trial("reject::loopback", NEEDS, loopback),
        trial("reject::a_tunnel", NEEDS, a_tunnel),
        trial(
            "reject::answers_are_right_on_the_wire",
            NEEDS,
            answers_are_right_on_the_wire,
        ),
        trial(
            "reject::checksums_are_right_whoever_completes_them",
            ETHTOOL,
            checksums_are_right_whoever_completes_them,
        ),
        trial(
            "reject::some_packets_are_not_answered",
            NEEDS,
            some_packets_are_not_answered,
        ),
        trial(
            "reject::two_who_reject_do_not_answer_each_other",
            NEEDS,
            two_who_reject_do_not_answer_each_other,
        ),
    ]
}

/// Bytes of the link layer's header.
const ETHERNET: usize = 14;
const PATIENCE: Duration = Duration::from_secs(15);
/// Longer than anybody who is told waits: TCP sends its SYN again after one second.
const TOLD_WITHIN: Duration = Duration::from_secs(10);

const ANSWERS: [&str; 4] = ["rst", "icmp-host", "icmp-port", "icmp-admin"];

/// What connect(2) fails with (`icmp_err_convert`, net/ipv4/icmp.c; `icmpv6_err_convert`, net/ipv6/icmp.c).
fn error_of(answer: &str, v6: bool) -> i32 {
    match (answer, v6) {
        ("rst" | "icmp-port", _) => libc::ECONNREFUSED,
        ("icmp-admin", true) => libc::EACCES,
        _ => libc::EHOSTUNREACH,
    }
}

fn type_and_code(answer: &str, v6: bool) -> (u8, u8) {
    match (answer, v6) {
        ("icmp-host", false) => (3, 1),
        ("icmp-port", false) => (3, 3),
        ("icmp-host", true) => (1, 3),
        ("icmp-port", true) => (1, 4),
        (_, false) => (3, 13),
        (_, true) => (1, 1),
    }
}

/// Where a rule is that rejects what `client` sends to `server`.
#[derive(Debug, Clone, Copy)]
enum Place {
    AtClient,
    AtServer,
}

const PLACES: [Place; 2] = [Place::AtClient, Place::AtServer];

impl Place {
    fn add(self, injector: &Injector, lab: &Lab, rest: &str) -> Result<()> {
        let (a, b) = (lab.a(), lab.b());
        let at = match self {
            Self::AtClient => format!("{} --iface eth0 --to {},{}", a.netns(), b.v4, b.v6),
            Self::AtServer => format!("{} --iface eth0 --from {},{}", b.netns(), a.v4, a.v6),
        };
        injector.add(&format!("no --netns {at} {rest}")).map(drop)
    }
}

fn counters(injector: &Injector) -> Result<RuleCounters> {
    let stats = injector.stats()?;
    let errors: u64 = stats
        .targets
        .iter()
        .map(|target| target.egress.errors + target.ingress.errors)
        .sum();
    ensure!(errors == 0, "{stats:?}");
    let rule = stats.rule("no")?;
    let counters = if rule.egress.matched_packets > 0 {
        rule.egress
    } else {
        rule.ingress
    };
    ensure!(
        counters.cut_packets == counters.matched_packets
            && counters.answered_packets <= counters.cut_packets,
        "{rule:?}"
    );
    Ok(counters)
}

/// Connects; the error, and how long it took.
fn refused(from: &Node, to: SocketAddr, within: Duration) -> Result<(Option<i32>, Duration)> {
    let began = Instant::now();
    let result = from
        .ns
        .enter(|| Ok(TcpStream::connect_timeout(&to, within)))?;
    let took = began.elapsed();
    match result {
        Ok(_) => bail!("connected to {to} in spite of a rule"),
        Err(error) => Ok((error.raw_os_error(), took)),
    }
}

fn who_connects_is_refused_as_asked() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    let _listeners = [
        tcp::listen(&b.ns, b.at(7000))?,
        tcp::listen(&b.ns, b.at6(7000))?,
    ];
    for place in PLACES {
        for answer in ANSWERS {
            place.add(
                &injector,
                &lab,
                &format!("--proto tcp --dst-port 7000 --reject {answer}"),
            )?;
            for to in [b.at(7000), b.at6(7000)] {
                let before = counters(&injector)?;
                let (error, took) = refused(a, to, TOLD_WITHIN)?;
                let after = counters(&injector)?;
                let sent = after.matched_packets - before.matched_packets;
                report(format!(
                    "{place:?} {answer} {to}: {error:?} after {took:.2?}, {sent} packets"
                ));
                ensure!(
                    error == Some(error_of(answer, to.is_ipv6())),
                    "{place:?} {answer} {to}: {error:?}"
                );
                ensure!(after.answered_packets == after.matched_packets, "{after:?}");
                // A reset waits until the socket is no longer busy with connecting. An error that comes while it is
                // does not (`tcp_v6_err`, net/ipv6/tcp_ipv6.c: sock_owned_by_user), and is heard when the SYN has
                // been sent again.
                ensure!(
                    sent == 1 || answer != "rst" && sent == 2,
                    "{place:?} {answer} {to}: {sent} packets"
                );
            }
            injector.json(&["heal", "no"])?;
        }
    }
    // In silence it takes longer than anybody waited.
    Place::AtClient.add(&injector, &lab, "--proto tcp --dst-port 7000 --cut")?;
    let (error, _) = refused(a, b.at(7000), Duration::from_secs(4))?;
    ensure!(error.is_none(), "a silent cut was heard of: {error:?}");
    ensure!(counters(&injector)?.answered_packets == 0, "a cut answers");
    Ok(())
}

/// What arrives is rejected to who sent it: the client of a rejected SYN-ACK goes on trying.
fn an_answer_goes_to_the_sender_only() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    let _listener = tcp::listen(&b.ns, b.at(7000))?;
    let capture = Capture::open(&b.ns, "eth0")?;
    injector.add(&format!(
        "no --netns {} --iface eth0 --from {} --proto tcp --src-port 7000 --reject rst",
        a.netns(),
        b.v4
    ))?;
    let (error, _) = refused(a, b.at(7000), Duration::from_secs(2))?;
    ensure!(error.is_none(), "the client was told: {error:?}");
    let now = counters(&injector)?;
    ensure!(
        now.matched_packets >= 2 && now.answered_packets == now.matched_packets,
        "{now:?}"
    );
    // Each SYN begins anew, since the reset ends the attempt at the server.
    let resets = capture.wait(2, |frame| {
        matches!(said(frame), Ok(Some(Said::Reset { .. })))
    })?;
    for frame in resets {
        let Some(Said::Reset { flags, ports, .. }) = said(&frame)? else {
            bail!("no reset: {frame:?}");
        };
        ensure!(flags == flag::RST && ports.1 == 7000, "{frame:?}");
    }
    Ok(())
}

fn said(frame: &Frame) -> Result<Option<Said>> {
    Said::read(&Ip::read(&frame.bytes[frame.link..])?)
}

/// What the error queue of a socket holds.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    error: u32,
    kind: u8,
    code: u8,
    offender: Option<IpAddr>,
    payload: Vec<u8>,
}

fn told(socket: &UdpSocket) -> Result<Option<Told>> {
    let mut space = cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
    let mut bytes = [0; 2048];
    let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let message =
        match recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags) {
            Ok(message) => message,
            Err(nix::errno::Errno::EAGAIN) => return Ok(None),
            Err(error) => return Err(error).context("reading the error queue"),
        };
    let length = message.bytes;
    let mut found = None;
    for control in message.cmsgs()? {
        let (error, offender) = match control {
            ControlMessageOwned::Ipv4RecvErr(error, from) => (
                error,
                from.map(|from| IpAddr::from(from.sin_addr.s_addr.to_ne_bytes())),
            ),
            ControlMessageOwned::Ipv6RecvErr(error, from) => {
                (error, from.map(|from| IpAddr::from(from.sin6_addr.s6_addr)))
            }
            _ => continue,
        };
        found = Some((error, offender));
    }
    let (error, offender) = found.context("an error without its description")?;
    Ok(Some(Told {
        error: error.ee_errno,
        kind: error.ee_type,
        code: error.ee_code,
        offender,
        payload: bytes[..length].to_vec(),
    }))
}

fn a_udp_sender_learns_of_what_became_of_its_datagram() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    let _receivers = [
        udp::socket(&b.ns, b.at(7000))?,
        udp::socket(&b.ns, b.at6(7000))?,
    ];
    for place in PLACES {
        for answer in &ANSWERS[1..] {
            place.add(
                &injector,
                &lab,
                &format!("--proto udp --dst-port 7000 --reject {answer}"),
            )?;
            for (from, to) in [(a.at(0), b.at(7000)), (a.at6(0), b.at6(7000))] {
                let v6 = to.is_ipv6();
                let socket = udp::socket(&a.ns, from)?;
                socket.connect(to)?;
                if v6 {
                    setsockopt(&socket, Ipv6RecvErr, &true)?;
                } else {
                    setsockopt(&socket, Ipv4RecvErr, &true)?;
                }
                let room = if v6 { 1280 - 48 - 48 } else { 576 - 28 - 28 };
                for length in [1, 5, 100, room, 1400] {
                    let payload: Vec<u8> = (0..=250).cycle().take(length).collect();
                    udp::send_answered(&socket, &payload)?;
                    let heard = wait_for("the sender is told", PATIENCE, || told(&socket))?;
                    let (kind, code) = type_and_code(answer, v6);
                    let expected = Told {
                        error: error_of(answer, v6).unsigned_abs(),
                        kind,
                        code,
                        offender: Some(to.ip()),
                        payload: payload[..length.min(room)].to_vec(),
                    };
                    ensure!(
                        heard == expected,
                        "{place:?} {answer} {to}: {heard:?}, not {expected:?}"
                    );
                }
                // A super-packet is answered once.
                let before = counters(&injector)?;
                setsockopt(&socket, UdpGsoSegment, &100).context("UDP_SEGMENT")?;
                udp::send_answered(&socket, &[9; 1000])?;
                wait_for("the sender is told", PATIENCE, || told(&socket))?;
                ensure!(told(&socket)?.is_none(), "told more than once");
                let after = counters(&injector)?;
                ensure!(
                    after.matched_packets - before.matched_packets == 10
                        && after.answered_packets - before.answered_packets == 1,
                    "{before:?} {after:?}"
                );
            }
            injector.json(&["heal", "no"])?;
        }
    }
    Ok(())
}

fn connections_are_reset() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    for place in PLACES {
        for to in [b.at(7000), b.at6(7000)] {
            let listener = tcp::listen(&b.ns, to)?;
            let mut client = tcp::connect(&a.ns, to, PATIENCE)?;
            let mut server = tcp::accept(&listener, PATIENCE)?;
            ensure!(tcp::pass(&mut client, &mut server, PATIENCE)?);
            place.add(&injector, &lab, "--proto tcp --dst-port 7000 --reject rst")?;
            client.write_all(&[1])?;
            client.set_read_timeout(Some(TOLD_WITHIN))?;
            let heard = client.read(&mut [0]).map_err(|error| error.kind());
            ensure!(
                heard == Err(ErrorKind::ConnectionReset),
                "{place:?} {to}: {heard:?}"
            );
            injector.json(&["heal", "no"])?;

            // In the middle of super-packets.
            let mut client = tcp::connect(&a.ns, to, PATIENCE)?;
            let mut server = tcp::accept(&listener, PATIENCE)?;
            client.set_write_timeout(Some(TOLD_WITHIN))?;
            let end = server.try_clone()?;
            let reader = std::thread::spawn(move || {
                let mut buffer = vec![0; 1 << 18];
                let mut total = 0_u64;
                while let Ok(got @ 1..) = server.read(&mut buffer) {
                    total += got as u64;
                }
                total
            });
            let chunk = vec![7; 1 << 18];
            for _ in 0..20 {
                client.write_all(&chunk)?;
            }
            place.add(
                &injector,
                &lab,
                "--proto tcp --dst-port 7000 --length 1000- --reject rst",
            )?;
            let failed = loop {
                if let Err(error) = client.write_all(&chunk) {
                    break error.kind();
                }
            };
            ensure!(
                matches!(failed, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe),
                "{place:?} {to}: {failed}"
            );
            let now = counters(&injector)?;
            report(format!("{place:?} {to}: {now:?}"));
            ensure!(
                now.answered_packets >= 1 && now.answered_packets < now.cut_packets,
                "no super-packet was rejected: {now:?}"
            );
            injector.json(&["heal", "no"])?;
            // The server is told nothing: its side is cut off by hand.
            end.shutdown(std::net::Shutdown::Both)?;
            let total = reader.join().map_err(|_| anyhow::anyhow!("the reader"))?;
            ensure!(total > 0, "nothing was sent before");
        }
    }
    Ok(())
}

fn loopback() -> Result<()> {
    let lab = Lab::pair()?;
    let mut node = lab.a().clone();
    node.v4 = [127, 0, 0, 1].into();
    node.v6 = std::net::Ipv6Addr::LOCALHOST;
    let injector = Injector::started(&[])?;
    for selector in [
        "--to 127.0.0.1,::1 --peer-port 7000",
        "--from 127.0.0.1,::1 --local-port 7000",
    ] {
        for answer in ANSWERS {
            injector.add(&format!(
                "no --netns {} --iface lo --proto tcp {selector} --reject {answer}",
                node.netns()
            ))?;
            for to in [node.at(7000), node.at6(7000)] {
                let _listener = tcp::listen(&node.ns, to)?;
                let (error, _) = refused(&node, to, TOLD_WITHIN)?;
                ensure!(
                    error == Some(error_of(answer, to.is_ipv6())),
                    "{selector} {answer} {to}: {error:?}"
                );
            }
            let now = counters(&injector)?;
            ensure!(
                now.answered_packets == now.matched_packets && now.matched_packets <= 4,
                "{now:?}"
            );
            injector.json(&["heal", "no"])?;
        }
    }
    Ok(())
}

/// A device without a link layer: what leaves it is answered on the spot, what arrives is answered through it.
fn a_tunnel() -> Result<()> {
    let lab = Lab::pair()?;
    let mut node = lab.a().clone();
    node.v4 = [10, 99, 0, 1].into();
    node.v6 = "fd99::1".parse()?;
    let (far_v4, far_v6): (IpAddr, IpAddr) = ("10.99.0.2".parse()?, "fd99::2".parse()?);
    let tun = Tun::new(&node.ns, "tun0")?;
    node.ns.ip(&[
        format!("addr add {}/24 dev tun0", node.v4),
        format!("addr add {}/64 dev tun0 nodad", node.v6),
        "link set tun0 up".to_owned(),
    ])?;
    let injector = Injector::started(&[])?;
    for answer in ANSWERS {
        injector.add(&format!(
            "no --netns {} --iface tun0 --to {far_v4},{far_v6} --proto tcp --peer-port 7000 --reject {answer}",
            node.netns()
        ))?;
        for to in [(far_v4, 7000).into(), (far_v6, 7000).into()] {
            let (error, _) = refused(&node, to, TOLD_WITHIN)?;
            ensure!(
                error == Some(error_of(answer, to.is_ipv6())),
                "leaving, {answer} {to}: {error:?}"
            );
        }
        let now = counters(&injector)?;
        ensure!(now.answered_packets == now.matched_packets, "{now:?}");
        injector.json(&["heal", "no"])?;

        injector.add(&format!(
            "no --netns {} --iface tun0 --from {far_v4},{far_v6} --proto tcp --local-port 7000 --reject {answer}",
            node.netns()
        ))?;
        let syn = Layer4::Tcp(1234, 7000, flag::SYN);
        for (number, packet) in (1..).zip([
            Packet::new(far_v4, node.v4, syn.clone()),
            Packet::new(far_v6, node.v6, syn.clone()),
        ]) {
            let frame = packet.frame(number);
            let packet = &frame[ETHERNET..];
            let v6 = packet[0] >> 4 == 6;
            tun.send(packet)?;
            let (ip, said) = tun.wait(|bytes| {
                let ip = Ip::read(bytes);
                // What the host says by itself, to all routers for one, may have options.
                let Ok(ip) = ip else { return Ok(None) };
                Ok(Said::read(&ip)?.map(|said| (ip, said)))
            })?;
            ensure!(ip.destination == if v6 { far_v6 } else { far_v4 }, "{ip:?}");
            match said {
                Said::Reset {
                    ports,
                    flags,
                    acknowledgement,
                    ..
                } => {
                    let header = if v6 { 40 } else { 20 };
                    // The SYN's own number, which is 1, is followed by one for its flag and by what it carries.
                    let next = 2 + u32::try_from(packet.len() - header - 20)?;
                    ensure!(
                        answer == "rst"
                            && ports == (7000, 1234)
                            && flags == flag::RST | flag::ACK
                            && acknowledgement == next,
                        "{answer}: {ports:?} {flags:#x} {acknowledgement}, expected {next}"
                    );
                }
                Said::Error { kind, code, about } => ensure!(
                    (kind, code) == type_and_code(answer, v6) && packet.starts_with(&about),
                    "{answer}: {kind} {code} about {about:02x?}"
                ),
            }
        }
        let now = counters(&injector)?;
        ensure!(
            now.matched_packets == 2 && now.answered_packets == 2,
            "{now:?}"
        );
        injector.json(&["heal", "no"])?;
    }
    Ok(())
}

/// A packet to be rejected, and its number.
struct Exchange {
    packet: Packet,
    number: u32,
}

fn exchanges(lab: &Lab) -> Vec<Exchange> {
    let (a, b) = (lab.a(), lab.b());
    let tcp = Layer4::Tcp(1234, 7000, flag::SYN);
    let udp = Layer4::Udp(1234, 7000);
    let mut packets = Vec::new();
    for layer4 in [
        tcp.clone(),
        Layer4::Tcp(1234, 7000, flag::ACK | flag::PSH),
        Layer4::Tcp(1234, 7000, flag::FIN),
        udp.clone(),
        Layer4::Sctp(1234, 7000, 1),
        Layer4::Other(99),
    ] {
        for length in [0, 101, 575, 577, 1281, 1500] {
            packets.push(Packet::new(a.v4, b.v4, layer4.clone()).length(length));
            packets.push(Packet::new(a.v6, b.v6, layer4.clone()).length(length));
        }
    }
    packets.push(Packet::new(a.v4, b.v4, Layer4::Icmp(8, 5)));
    packets.push(Packet::new(a.v6, b.v6, Layer4::Icmp(128, 5)));
    packets.push(Packet::new(a.v4, b.v4, udp.clone()).fragment(7, 0, true));
    packets.push(Packet::new(a.v6, b.v6, udp.clone()).fragment(7, 0, true));
    for layer4 in [tcp, udp] {
        for bytes in [4, 40] {
            packets.push(Packet::new(a.v4, b.v4, layer4.clone()).options(bytes));
        }
        for extensions in [
            &[Extension::HopByHop][..],
            &[
                Extension::HopByHop,
                Extension::Routing,
                Extension::Destination(64),
            ],
        ] {
            packets.push(Packet::new(a.v6, b.v6, layer4.clone()).extensions(extensions));
        }
        for tags in [
            &[(ETH_VLAN, 5)][..],
            &[(ETH_QINQ, 6), (ETH_VLAN, 5)],
            &[(ETH_QINQ, 7), (ETH_VLAN, 6), (ETH_VLAN, 5)],
        ] {
            packets.push(Packet::new(a.v4, b.v4, layer4.clone()).tagged(tags));
            packets.push(
                Packet::new(a.v6, b.v6, layer4.clone())
                    .extensions(&[Extension::HopByHop])
                    .tagged(tags),
            );
        }
    }
    (1..)
        .zip(packets)
        .map(|(number, packet)| Exchange { packet, number })
        .collect()
}

/// Frames of all kinds, sent as they are; each answer is compared with what it should be, byte by byte.
fn answers_are_right_on_the_wire() -> Result<()> {
    let lab = Lab::pair()?;
    let a = lab.a();
    let injector = Injector::started(&[])?;
    let sender = Sender::open(&a.ns)?;
    let capture = Capture::open(&a.ns, "eth0")?;
    for answer in ANSWERS {
        let only = if answer == "rst" { "--proto tcp" } else { "" };
        Place::AtServer.add(&injector, &lab, &format!("{only} --reject {answer}"))?;
        let mut expected = 0;
        for Exchange { packet, number } in exchanges(&lab) {
            let is_tcp = matches!(packet.layer4, Layer4::Tcp(..));
            if answer == "rst" && !is_tcp {
                continue;
            }
            let sent = packet.frame(number);
            capture.drain()?;
            sender.send(&sent)?;
            expected += 1;
            let frame = capture
                .wait(1, |frame| frame.bytes[6..12] == sent[..6])
                .with_context(|| format!("{answer}: no answer to {packet:?}"))?
                .remove(0);
            check(answer, &packet, &sent, &frame)
                .with_context(|| format!("{answer}: {packet:?} was answered with {frame:02x?}"))?;
        }
        let now = counters(&injector)?;
        ensure!(
            now.matched_packets == expected && now.answered_packets == expected,
            "{answer}: {expected} packets, {now:?}"
        );
        injector.json(&["heal", "no"])?;
    }
    Ok(())
}

fn check(answer: &str, packet: &Packet, sent: &[u8], frame: &Frame) -> Result<()> {
    ensure!(
        frame.bytes[..6] == sent[6..12] && frame.bytes[6..12] == sent[..6],
        "hardware addresses"
    );
    // The outermost tag arrives beside the frame.
    let mut tags: Vec<u16> = frame.tag.into_iter().collect();
    for tag in frame.bytes[12..frame.link - 2].chunks(4) {
        tags.push(u16::from_be_bytes([tag[2], tag[3]]));
    }
    let wanted: Vec<u16> = packet.tags.iter().map(|(_, id)| *id).collect();
    ensure!(tags == wanted, "tags {tags:?}, not {wanted:?}");
    let ip = Ip::read(&frame.bytes[frame.link..])?;
    ensure!(
        (ip.source, ip.destination) == (packet.dst, packet.src) && ip.ttl == 64,
        "{ip:?}"
    );
    let original = &sent[14 + 4 * packet.tags.len()..];
    let v6 = packet.src.is_ipv6();
    let said = Said::read(&ip)?.context("says nothing")?;
    let wanted = if answer == "rst" {
        let Layer4::Tcp(from, to, flags) = packet.layer4 else {
            bail!("a reset of something else");
        };
        let headers = original.len() - body_of(packet, original).len() + 20;
        // Frames of these tests have sequence number 1 and acknowledge 0.
        let length = u32::try_from(original.len() - headers)?
            + u32::from(flags & (flag::SYN | flag::FIN) != 0);
        let acks = flags & flag::ACK != 0;
        Said::Reset {
            ports: (to, from),
            sequence: 0,
            acknowledgement: if acks { 0 } else { 1 + length },
            flags: if acks {
                flag::RST
            } else {
                flag::RST | flag::ACK
            },
        }
    } else {
        let (kind, code) = type_and_code(answer, v6);
        let room = if v6 { 1280 - 48 } else { 576 - 28 };
        Said::Error {
            kind,
            code,
            about: original[..original.len().min(room)].to_vec(),
        }
    };
    ensure!(said == wanted, "{said:02x?}, not {wanted:02x?}");
    Ok(())
}

/// What is behind the network header and its extensions.
fn body_of<'a>(packet: &Packet, original: &'a [u8]) -> &'a [u8] {
    let network = if packet.src.is_ipv4() {
        20 + packet.options.len()
    } else {
        let bytes = |extension: &Extension| match extension {
            Extension::Destination(bytes) => usize::from(*bytes),
            Extension::HopByHop | Extension::Routing => 8,
        };
        40 + packet.extensions.iter().map(bytes).sum::<usize>()
    };
    &original[network..]
}

/// The kernel's own packets, of which a device completes the checksum or not, in both directions.
fn checksums_are_right_whoever_completes_them() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    for offload in ["on", "off"] {
        for node in [a, b] {
            node.ns.tool(&format!("ethtool -K eth0 tx {offload}"))?;
        }
        for place in PLACES {
            for answer in ANSWERS {
                let proto = if answer == "rst" { "tcp" } else { "tcp,udp" };
                place.add(
                    &injector,
                    &lab,
                    &format!("--proto {proto} --dst-port 7000 --reject {answer}"),
                )?;
                let capture = Capture::open(&a.ns, "eth0")?;
                for (from, to) in [(a.at(0), b.at(7000)), (a.at6(0), b.at6(7000))] {
                    let v6 = to.is_ipv6();
                    let mut answers = 0;
                    if answer != "rst" {
                        let socket = udp::socket(&a.ns, from)?;
                        socket.connect(to)?;
                        for length in [0, 3, 64, 1300] {
                            udp::send_answered(&socket, &vec![0x5a; length])?;
                            answers += 1;
                        }
                    }
                    let (error, _) = refused(a, to, TOLD_WITHIN)?;
                    ensure!(
                        error == Some(error_of(answer, v6)),
                        "{offload} {place:?} {answer} {to}: {error:?}"
                    );
                    answers += 1;
                    // `Ip::read` checks the checksums.
                    let frames = capture.wait(answers, |frame| frame.bytes[6..12] == b.mac)?;
                    for frame in &frames {
                        let ip = Ip::read(&frame.bytes[frame.link..])
                            .with_context(|| format!("{offload} {place:?} {answer}: {frame:?}"))?;
                        let said = Said::read(&ip)?.context("no answer")?;
                        if let Said::Error { about, .. } = said {
                            whole_checksum(&about, v6).with_context(|| {
                                format!("{offload} {place:?} {answer}: {frame:02x?}")
                            })?;
                        }
                        ensure!(
                            !frame.partial || offload == "on" || matches!(place, Place::AtClient),
                            "a checksum was left open on the wire: {frame:?}"
                        );
                    }
                    report(format!(
                        "tx {offload} {place:?} {answer} {to}: {} answers, {} to be completed",
                        frames.len(),
                        frames.iter().filter(|frame| frame.partial).count()
                    ));
                }
                injector.json(&["heal", "no"])?;
            }
        }
    }
    Ok(())
}

/// The checksum of a packet within an error is right, where it is there as a whole; or it is as its sender left it
/// to a device, with the sum of the pseudo-header in its place.
fn whole_checksum(about: &[u8], v6: bool) -> Result<()> {
    let stated = |at: usize| usize::from(u16::from_be_bytes([about[at], about[at + 1]]));
    let (length, header, protocol) = if v6 {
        (stated(4) + 40, 40, about[6])
    } else {
        (stated(2), 20, about[9])
    };
    if length != about.len() {
        return Ok(());
    }
    let mut summed = about[if v6 { 8..40 } else { 12..20 }].to_vec();
    summed.extend([0, protocol]);
    summed.extend(u32::try_from(length - header)?.to_be_bytes());
    summed.extend(&about[header..]);
    let field = header + if protocol == 6 { 16 } else { 6 };
    let left = sum(&summed[..summed.len() - about[header..].len()]).to_be_bytes();
    let sum = sum(&summed);
    ensure!(
        sum == 0xffff || about[field..field + 2] == left,
        "the original's checksum: {sum:#x}"
    );
    Ok(())
}

fn some_packets_are_not_answered() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    let sender = Sender::open(&a.ns)?;
    let capture = Capture::open(&a.ns, "eth0")?;
    let udp = || Layer4::Udp(1234, 7000);
    let to = |dst: IpAddr| match dst {
        IpAddr::V4(_) => Packet::new(a.v4, dst, udp()),
        IpAddr::V6(_) => Packet::new(a.v6, dst, udp()),
    };
    let mut silent = vec![
        to([224, 0, 0, 5].into()),
        to([255, 255, 255, 255].into()),
        to("ff02::5".parse()?),
        Packet::new([0, 0, 0, 0], b.v4, udp()),
        Packet::new(std::net::Ipv6Addr::UNSPECIFIED, b.v6, udp()),
        Packet::new([239, 1, 1, 1], b.v4, udp()),
        Packet::new(a.v4, b.v4, udp()).fragment(9, 64, false),
        Packet::new(a.v6, b.v6, udp()).fragment(9, 64, true),
    ];
    for flags in [flag::RST, flag::RST | flag::ACK] {
        silent.push(Packet::new(a.v4, b.v4, Layer4::Tcp(1, 2, flags)));
        silent.push(Packet::new(a.v6, b.v6, Layer4::Tcp(1, 2, flags)));
    }
    for kind in [3, 4, 5, 11, 12] {
        silent.push(Packet::new(a.v4, b.v4, Layer4::Icmp(kind, 1)));
    }
    for kind in [1, 2, 3, 4, 135, 136] {
        silent.push(Packet::new(a.v6, b.v6, Layer4::Icmp(kind, 1)));
    }
    let mut frames: Vec<Vec<u8>> = (1..)
        .zip(&silent)
        .map(|(number, packet)| packet.frame(number))
        .collect();
    for address in [[0xff; 6], [1, 0, 0x5e, 0, 0, 5]] {
        let mut frame = to(b.v4.into()).frame(0);
        frame[..6].copy_from_slice(&address);
        frames.push(frame);
    }
    injector.add(&format!(
        "no --netns {} --iface eth0 -d ingress --proto tcp,udp,icmp,icmpv6,nd --all-traffic --reject icmp-port",
        b.netns()
    ))?;
    for frame in &frames {
        sender.send(frame)?;
    }
    // What is answered, sent last.
    let last = to(b.v4.into()).frame(99);
    sender.send(&last)?;
    let heard = capture.wait(1, |frame| frame.bytes[..6] == last[6..12])?;
    ensure!(heard.len() == 1, "{heard:02x?}");
    let Some(Said::Error { about, .. }) = said(&heard[0])? else {
        bail!("no error: {heard:?}");
    };
    ensure!(
        about == last[14..],
        "an answer to another one: {about:02x?}"
    );
    let now = counters(&injector)?;
    ensure!(
        now.cut_packets > frames.len() as u64 && now.answered_packets == 1,
        "{now:?}"
    );
    Ok(())
}

fn two_who_reject_do_not_answer_each_other() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    for (name, node) in [("a", a), ("b", b)] {
        injector.add(&format!(
            "{name} --netns {} --iface eth0 -d ingress --all-traffic --reject icmp-port",
            node.netns()
        ))?;
        injector.add(&format!(
            "{name}-out --netns {} --iface eth0 -d egress --proto udp --src-port 9 --reject icmp-port",
            node.netns()
        ))?;
    }
    let seen = [Capture::open(&a.ns, "eth0")?, Capture::open(&b.ns, "eth0")?];
    let socket = udp::socket(&a.ns, a.at(0))?;
    socket.connect(b.at(7000))?;
    socket.send(&[1; 10])?;
    // b rejects the datagram; a rejects b's error, of which nobody hears.
    let is_error = |frame: &Frame| matches!(said(frame), Ok(Some(Said::Error { .. })));
    ensure!(seen[0].wait(1, is_error)?.len() == 1);
    wait_until("a cuts the error", PATIENCE, || {
        Ok(injector.stats()?.rule("a")?.ingress.cut_packets == 1)
    })?;
    let stats = injector.stats()?;
    let (at_a, at_b) = (stats.rule("a")?.ingress, stats.rule("b")?.ingress);
    ensure!(
        at_a.answered_packets == 0 && at_b.matched_packets == 1 && at_b.answered_packets == 1,
        "{at_a:?} {at_b:?}"
    );
    ensure!(
        !seen[1].drain()?.iter().any(is_error) && !seen[0].drain()?.iter().any(is_error),
        "an error was answered"
    );
    Ok(())
}

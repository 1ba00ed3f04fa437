//! The host side by itself: attaching and undoing, recovery, namespaces, routes, labs, probes.
//!
//! Each test runs on a thread with a mount namespace of its own and an empty /run in it. The network
//! namespaces that it names exist there only, and go with it, whatever becomes of the test.

use std::{
    fs, io,
    net::{IpAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::Path,
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use injector::{
    attach::{AttachError, Attachment, EGRESS_NAME, Presence, TargetLink, inspect},
    journal::{self, FILE_NAME, Journal},
    lab,
    netlink::{self, Hook, LinkKind, NewFilter},
    netns::{Netns, NetnsError, in_new},
    probe,
    rules::model::NetnsRef,
};
use ipnet::IpNet;
use libtest_mimic::{Completion, Failed, Trial};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

type Outcome = Result<Completion, Failed>;
type Test = fn() -> Outcome;

const DONE: Outcome = Ok(Completion::Completed);
/// How long to wait for what the kernel does in its own time.
const PATIENCE: Duration = Duration::from_secs(30);

/// The tests of the host side.
pub(crate) fn tests() -> Vec<Trial> {
    let all: [(&'static str, Test); 24] = [
        ("attach_and_detach_leave_no_trace", no_trace),
        ("foreign_clsact_and_filters_survive", foreign_survive),
        ("a_filter_added_meanwhile_keeps_clsact", added_meanwhile),
        ("a_chain_added_meanwhile_keeps_clsact", chain_meanwhile),
        ("a_failed_attach_leaves_nothing", failed_attach),
        ("dropping_detaches", dropping),
        ("a_crash_at_any_step_is_recovered_from", crash_at_any_step),
        (
            "a_namesake_of_an_interface_is_not_touched",
            namesake_interface,
        ),
        (
            "a_namesake_of_a_namespace_is_not_touched",
            namesake_namespace,
        ),
        ("a_renamed_interface_is_still_recovered", renamed_interface),
        (
            "a_namespace_without_its_name_is_still_recovered",
            nameless_namespace,
        ),
        (
            "a_namespace_can_be_deleted_while_attached",
            namespace_deleted,
        ),
        ("a_vanished_interface_is_noticed", interface_deleted),
        ("a_removed_filter_is_noticed", filter_removed),
        ("tcx_xdp_and_earlier_filters_are_seen", obstacles),
        (
            "ingress_qdiscs_and_shared_blocks_are_refused",
            unusable_qdiscs,
        ),
        ("loopback_is_attached_on_egress_only", loopback),
        ("interfaces_are_inspected", inspection),
        ("double_passes_are_found", double_passes),
        ("routes_and_addresses_are_read", routes),
        ("long_dumps_are_complete", long_dumps),
        ("labs_come_and_go_without_a_trace", labs),
        ("labs_half_made_or_tampered_with_are_removed", broken_labs),
        ("everything_is_probed", probing),
    ];
    all.into_iter()
        .map(|(name, test)| Trial::ignorable_test(format!("host::{name}"), move || isolated(test)))
        .collect()
}

fn isolated(test: Test) -> Outcome {
    if !nix::unistd::geteuid().is_root() {
        return Ok(Completion::ignored_with("needs root"));
    }
    let thread = thread::Builder::new().spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none)?;
        test()
    })?;
    thread
        .join()
        .unwrap_or_else(|_| Err(Failed::from("the test panicked")))
}

// ---- tools -------------------------------------------------------------------------------------

/// Runs a command; its output, or what it complained of.
fn run(words: &str) -> Result<String, Failed> {
    let mut words = words.split_whitespace();
    let program = words.next().unwrap_or_default();
    let output = Command::new(program).args(words.clone()).output()?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!(
            "{program} {}: {}",
            words.collect::<Vec<_>>().join(" "),
            String::from_utf8_lossy(&output.stderr)
        )
        .into())
    }
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "a text is handed over where the test ends, and most are literals"
)]
fn check(holds: bool, what: impl ToString) -> Result<(), Failed> {
    if holds {
        Ok(())
    } else {
        Err(what.to_string().into())
    }
}

fn equal<T: PartialEq + std::fmt::Debug>(found: &T, expected: &T) -> Result<(), Failed> {
    check(
        found == expected,
        format!("expected {expected:#?}, found {found:#?}"),
    )
}

/// Everything of a namespace that the injector must leave as it was, as text.
fn snapshot(netns: &str) -> Result<String, Failed> {
    let mut text = String::new();
    for command in [
        "ip -n NS -d link show",
        "ip -n NS address show",
        "ip -n NS route show table all",
        "ip -n NS -6 route show table all",
        "ip -n NS rule show",
        "tc -n NS -d qdisc show",
    ] {
        text += &run(&command.replace("NS", netns))?;
    }
    for link in within(netns, netlink::links)?? {
        for hook in Hook::BOTH {
            text += &run(&format!(
                "tc -n {netns} filter show dev {} {hook}",
                link.name
            ))?;
            text += &run(&format!(
                "tc -n {netns} chain show dev {} {hook}",
                link.name
            ))?;
        }
    }
    Ok(text)
}

fn netns(name: &str) -> Result<Netns, NetnsError> {
    Netns::resolve(&NetnsRef::Name(name.to_owned()))
}

fn within<T: Send>(name: &str, f: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
    netns(name)?.run(f)
}

/// A namespace with a veth pair, va and vb.
fn pair(name: &str) -> Result<(), Failed> {
    run(&format!("ip netns add {name}"))?;
    // Duplicate address detection takes seconds, and changes what is shown when it ends.
    within(name, || {
        fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0")
    })??;
    run(&format!("ip -n {name} link add va type veth peer name vb"))?;
    for link in ["lo", "va", "vb"] {
        run(&format!("ip -n {name} link set {link} up"))?;
    }
    settle(name)
}

/// Waits until carriers and addresses have stopped changing by themselves.
fn settle(name: &str) -> Result<(), Failed> {
    wait(&format!("{name} to settle"), || {
        let addresses = run(&format!("ip -n {name} address show"))?;
        Ok(!addresses.contains("tentative")
            && within(name, netlink::links)??
                .iter()
                .all(|link| link.running || !link.up))
    })
}

fn wait(what: &str, mut holds: impl FnMut() -> Result<bool, Failed>) -> Result<(), Failed> {
    let deadline = Instant::now() + PATIENCE;
    while !holds()? {
        check(
            Instant::now() < deadline,
            format!("waited in vain for {what}"),
        )?;
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// `BPF_PROG_LOAD` of `r0 = value; exit`.
fn load(kind: u32, value: i32, name: &str) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log: [u64; 2],
        kern_version: u32,
        prog_flags: u32,
        prog_name: [u8; 16],
    }
    let code = [0xb7 | u64::from(value.cast_unsigned()) << 32, 0x95];
    let mut prog_name = [0; 16];
    prog_name[..name.len()].copy_from_slice(name.as_bytes());
    let mut attr = Attr {
        prog_type: kind,
        insn_cnt: 2,
        insns: code.as_ptr().expose_provenance() as u64,
        license: c"GPL".as_ptr().expose_provenance() as u64,
        log: [0; 2],
        kern_version: 0,
        prog_flags: 0,
        prog_name,
    };
    // SAFETY: the code and the licence outlive the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, 5, &raw mut attr, size_of::<Attr>()) };
    own(fd)
}

/// `BPF_LINK_CREATE` of a program on an interface of this thread's namespace.
fn link(
    program: BorrowedFd<'_>,
    ifindex: u32,
    attach_type: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    let mut attr = [
        program.as_raw_fd().cast_unsigned(),
        ifindex,
        attach_type,
        flags,
        0,
        0,
        0,
        0,
    ];
    // SAFETY: the attribute holds numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, 28, &raw mut attr, 32) };
    own(fd)
}

/// Names of all loaded programs.
fn program_names() -> Result<Vec<String>, Failed> {
    let mut names = Vec::new();
    let mut attr = [0_u32; 3];
    // `BPF_PROG_GET_NEXT_ID` reads the first number and writes the second.
    // SAFETY: the attribute holds numbers only.
    while unsafe { libc::syscall(libc::SYS_bpf, 11, &raw mut attr, 12) } == 0 {
        names.extend(netlink::program_by_id(attr[1])?.map(|program| program.name));
        attr[0] = attr[1];
    }
    Ok(names)
}

fn own(fd: libc::c_long) -> io::Result<OwnedFd> {
    match libc::c_int::try_from(fd) {
        Ok(fd) if fd >= 0 => {
            // SAFETY: the kernel has just handed us this descriptor.
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        }
        _ => Err(io::Error::last_os_error()),
    }
}

const SCHED_CLS: u32 = 3;
const XDP: u32 = 6;

/// A state directory with its journal, and a program to attach.
struct Host {
    dir: tempfile::TempDir,
    journal: Arc<Journal>,
    program: OwnedFd,
}

impl Host {
    fn new() -> Result<Self, Failed> {
        let dir = tempfile::tempdir()?;
        Ok(Self {
            journal: Arc::new(Journal::open(dir.path())?),
            dir,
            program: load(SCHED_CLS, -1, "injb_pass")?,
        })
    }

    fn attach(&self, link: &TargetLink) -> Result<Attachment, AttachError> {
        let program = self.program.as_fd();
        Attachment::attach(link, &self.journal, program, program, 7)
    }

    fn attach_to(&self, name: &str, ifname: &str) -> Result<Attachment, Failed> {
        Ok(self.attach(&inspect(&netns(name)?, ifname)?)?)
    }

    /// What the next daemon's recovery says, after this one has forgotten everything.
    fn recover(&mut self) -> Result<journal::Recovery, Failed> {
        let recovery = journal::recover(self.dir.path())?;
        self.journal = Arc::new(Journal::open(self.dir.path())?);
        Ok(recovery)
    }

    fn journal_is_empty(&self) -> Result<(), Failed> {
        check(
            !journal::has_leftovers(self.dir.path())?,
            fs::read_to_string(self.dir.path().join(FILE_NAME))?,
        )
    }

    /// Attaches somebody else's filter.
    fn foreign(&self, name: &str, ifname: &str, hook: Hook, priority: u16) -> Result<(), Failed> {
        within(name, || {
            let index = index(ifname)?;
            Ok(netlink::attach(
                index,
                hook,
                &NewFilter {
                    program: self.program.as_fd(),
                    name: "theirs",
                    priority,
                    handle: 5,
                    classid: 0,
                },
            )?)
        })?
    }
}

fn index(ifname: &str) -> Result<u32, Failed> {
    Ok(netlink::link_by_name(ifname)?
        .ok_or_else(|| format!("there is no {ifname}"))?
        .index)
}

fn filters(name: &str, hook: Hook) -> Result<String, Failed> {
    run(&format!("tc -n {name} filter show dev va {hook}"))
}

// ---- attaching and undoing ---------------------------------------------------------------------

fn no_trace() -> Outcome {
    pair("injb-1")?;
    let host = Host::new()?;
    let before = snapshot("injb-1")?;
    let mut attachment = host.attach_to("injb-1", "va")?;
    for hook in Hook::BOTH {
        let text = filters("injb-1", hook)?;
        for part in [
            "pref 1 bpf",
            &format!("injector:{hook}"),
            "direct-action",
            "flowid :7",
        ] {
            check(text.contains(part), format!("{part} is not in {text}"))?;
        }
        let list = within("injb-1", || -> Result<_, Failed> {
            Ok(netlink::filters(index("va")?, hook)?)
        })??;
        equal(&list.len(), &1)?;
        let bpf = list[0].bpf.as_ref().ok_or("not a bpf filter")?;
        equal(&(list[0].priority, list[0].handle), &(1, 1))?;
        equal(&(bpf.classid, bpf.direct_action), &(7, true))?;
        equal(&bpf.id, &netlink::program(host.program.as_fd())?.id)?;
    }
    equal(&attachment.verify()?, &Presence::Present)?;
    equal(&attachment.ahead()?, &vec![])?;
    equal(&host.journal.pending().len(), &3)?;
    let mut second = host.attach_to("injb-1", "vb")?;
    equal(&second.detach()?.notes, &vec![])?;
    equal(&attachment.detach()?.notes, &vec![])?;
    equal(&attachment.detach()?.notes, &vec![])?;
    equal(&snapshot("injb-1")?, &before)?;
    host.journal_is_empty()?;
    DONE
}

fn foreign_survive() -> Outcome {
    pair("injb-1")?;
    let mut host = Host::new()?;
    run("tc -n injb-1 qdisc add dev va clsact")?;
    run("tc -n injb-1 qdisc add dev va root handle 1: pfifo limit 7")?;
    run("tc -n injb-1 chain add dev va egress chain 5")?;
    host.foreign("injb-1", "va", Hook::Ingress, 1)?;
    host.foreign("injb-1", "va", Hook::Ingress, 2)?;
    host.foreign("injb-1", "va", Hook::Egress, 3)?;
    let before = snapshot("injb-1")?;
    let mut attachment = host.attach_to("injb-1", "va")?;
    check(
        filters("injb-1", Hook::Ingress)?.contains("pref 3 bpf"),
        "lowest free preference",
    )?;
    check(
        filters("injb-1", Hook::Egress)?.contains("pref 1 bpf"),
        "lowest free preference",
    )?;
    let ahead: Vec<String> = attachment
        .ahead()?
        .into_iter()
        .map(|obstacle| format!("{} {}", obstacle.hook, obstacle.what))
        .collect();
    equal(
        &ahead,
        &["1", "2"]
            .map(|pref| format!("ingress filter pref {pref} bpf 'theirs'"))
            .to_vec(),
    )?;
    equal(&attachment.detach()?.notes, &vec![])?;
    equal(&snapshot("injb-1")?, &before)?;
    // The same after a crash.
    std::mem::forget(host.attach_to("injb-1", "va")?);
    let recovery = host.recover()?;
    equal(&(recovery.undone.len(), recovery.failed.len()), &(2, 0))?;
    equal(&snapshot("injb-1")?, &before)?;
    DONE
}

fn added_meanwhile() -> Outcome {
    pair("injb-1")?;
    let host = Host::new()?;
    let mut attachment = host.attach_to("injb-1", "va")?;
    host.foreign("injb-1", "va", Hook::Egress, 9)?;
    let notes = attachment.detach()?.notes;
    check(
        notes.len() == 1 && notes[0].contains("egress filter pref 9 bpf 'theirs'"),
        format!("{notes:?}"),
    )?;
    let text = filters("injb-1", Hook::Egress)?;
    check(text.contains("theirs") && !text.contains("injector"), text)?;
    equal(&filters("injb-1", Hook::Ingress)?, &String::new())?;
    host.journal_is_empty()?;
    DONE
}

fn chain_meanwhile() -> Outcome {
    pair("injb-1")?;
    let mut host = Host::new()?;
    std::mem::forget(host.attach_to("injb-1", "va")?);
    run("tc -n injb-1 chain add dev va ingress chain 4")?;
    let recovery = host.recover()?;
    equal(&(recovery.undone.len(), recovery.gone.len()), &(2, 1))?;
    check(
        recovery.gone[0].contains("ingress chain 4"),
        &recovery.gone[0],
    )?;
    check(
        run("tc -n injb-1 chain show dev va ingress")?.contains("chain 4"),
        "their chain",
    )?;
    DONE
}

fn failed_attach() -> Outcome {
    pair("injb-1")?;
    let host = Host::new()?;
    let before = snapshot("injb-1")?;
    let link = inspect(&netns("injb-1")?, "va")?;
    // The egress program comes last; one for XDP loads, but does not attach here.
    let wrong = load(XDP, 2, "injb_wrong")?;
    let result = Attachment::attach(&link, &host.journal, wrong.as_fd(), host.program.as_fd(), 1);
    let error = result.map(|_| ()).err().ok_or("a wrong program attached")?;
    check(
        error.to_string().contains("injector:egress") && error.to_string().contains("'injb-1'"),
        &error,
    )?;
    equal(&snapshot("injb-1")?, &before)?;
    host.journal_is_empty()?;
    // Nothing is changed that cannot be written down.
    let gone = TargetLink {
        index: 4711,
        ..link
    };
    check(
        matches!(host.attach(&gone), Err(AttachError::Gone { .. })),
        "no such index",
    )?;
    host.journal_is_empty()?;
    DONE
}

fn dropping() -> Outcome {
    pair("injb-1")?;
    let host = Host::new()?;
    let before = snapshot("injb-1")?;
    drop(host.attach_to("injb-1", "va")?);
    equal(&snapshot("injb-1")?, &before)?;
    host.journal_is_empty()?;
    DONE
}

// ---- recovery ----------------------------------------------------------------------------------

fn crash_at_any_step() -> Outcome {
    pair("injb-1")?;
    let mut host = Host::new()?;
    let before = snapshot("injb-1")?;
    let file = host.dir.path().join(FILE_NAME);
    // Written down so many of the three changes; made so many of them.
    for (written, made) in [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3)] {
        let attachment = host.attach_to("injb-1", "va")?;
        let index = attachment.link().index;
        std::mem::forget(attachment);
        let lines = fs::read_to_string(&file)?;
        let lines: Vec<&str> = lines
            .lines()
            .filter(|line| line.contains("entry"))
            .collect();
        equal(&lines.len(), &3)?;
        within("injb-1", || -> Result<(), Failed> {
            if made < 3 {
                netlink::detach(index, Hook::Egress, 1, 1)?;
            }
            if made < 2 {
                netlink::detach(index, Hook::Ingress, 1, 1)?;
            }
            if made < 1 {
                netlink::delete_clsact(index)?;
            }
            Ok(())
        })??;
        // A line that was being written at that moment does not count.
        fs::write(&file, lines[..written].join("\n") + "\n{\"id\":99,\"ent")?;
        let recovery = host.recover()?;
        equal(&recovery.failed, &vec![])?;
        equal(
            &(recovery.undone.len(), recovery.gone.len()),
            &(made, written - made),
        )?;
        equal(&snapshot("injb-1")?, &before)?;
        check(
            host.recover()?.is_empty(),
            "a second recovery finds nothing",
        )?;
    }
    DONE
}

fn namesake_interface() -> Outcome {
    pair("injb-1")?;
    let mut host = Host::new()?;
    let attachment = host.attach_to("injb-1", "va")?;
    let ifindex = attachment.link().index;
    let mut second = host.attach_to("injb-1", "vb")?;
    std::mem::forget(attachment);
    run("ip -n injb-1 link del va")?;
    run(&format!(
        "ip -n injb-1 link add va index {ifindex} type veth peer name vb"
    ))?;
    run("tc -n injb-1 qdisc add dev va clsact")?;
    settle("injb-1")?;
    let before = snapshot("injb-1")?;
    equal(&second.verify()?, &Presence::InterfaceGone)?;
    equal(&second.detach()?.notes.len(), &3)?;
    let recovery = host.recover()?;
    equal(
        &(
            recovery.undone.len(),
            recovery.gone.len(),
            recovery.failed.len(),
        ),
        &(0, 3, 0),
    )?;
    equal(&snapshot("injb-1")?, &before)?;
    DONE
}

fn namesake_namespace() -> Outcome {
    pair("injb-1")?;
    let mut host = Host::new()?;
    let id = netns("injb-1")?.id;
    std::mem::forget(host.attach_to("injb-1", "va")?);
    run("ip netns del injb-1")?;
    // The inode number comes back once the kernel has freed the namespace.
    let deadline = Instant::now() + Duration::from_secs(3);
    loop {
        pair("injb-1")?;
        if netns("injb-1")?.id.ino == id.ino || Instant::now() > deadline {
            break;
        }
        run("ip netns del injb-1")?;
        thread::sleep(Duration::from_millis(20));
    }
    run("tc -n injb-1 qdisc add dev va clsact")?;
    host.foreign("injb-1", "va", Hook::Ingress, 1)?;
    check(
        netns("injb-1")?.id != id,
        "two namespaces have one identity",
    )?;
    let before = snapshot("injb-1")?;
    let recovery = host.recover()?;
    equal(
        &(
            recovery.undone.len(),
            recovery.gone.len(),
            recovery.failed.len(),
        ),
        &(0, 3, 0),
    )?;
    equal(&snapshot("injb-1")?, &before)?;
    DONE
}

fn renamed_interface() -> Outcome {
    pair("injb-1")?;
    let mut host = Host::new()?;
    let attachment = host.attach_to("injb-1", "va")?;
    run("ip -n injb-1 link set va down")?;
    run("ip -n injb-1 link set va name c")?;
    run("ip -n injb-1 link set c address 02:00:00:00:00:09")?;
    equal(&attachment.verify()?, &Presence::Present)?;
    std::mem::forget(attachment);
    let recovery = host.recover()?;
    equal(&(recovery.undone.len(), recovery.gone.len()), &(3, 0))?;
    check(
        !run("tc -n injb-1 qdisc show")?.contains("clsact"),
        "clsact is left",
    )?;
    DONE
}

fn nameless_namespace() -> Outcome {
    pair("injb-1")?;
    let mut host = Host::new()?;
    let home = netns("injb-1")?;
    std::mem::forget(host.attach_to("injb-1", "va")?);
    let mut inhabitant = home.command("sleep")?.arg("600").spawn()?;
    run("ip netns del injb-1")?;
    let recovery = host.recover();
    let left = Netns::resolve(&NetnsRef::Pid(inhabitant.id()))
        .map(|other| other.run(|| Ok::<_, Failed>(netlink::has_clsact(index("va")?)?)));
    inhabitant.kill()?;
    inhabitant.wait()?;
    let recovery = recovery?;
    equal(&(recovery.undone.len(), recovery.failed.len()), &(3, 0))?;
    check(!left???, "clsact is left")?;
    DONE
}

fn namespace_deleted() -> Outcome {
    pair("injb-1")?;
    run("ip netns add injb-2")?;
    run("ip -n injb-1 link set vb netns injb-2")?;
    let host = Host::new()?;
    let mut attachment = host.attach_to("injb-1", "va")?;
    equal(&attachment.verify()?, &Presence::Present)?;
    run("ip netns del injb-1")?;
    // The other end goes when the kernel frees the namespace, which an open file would prevent.
    wait("the namespace to be freed", || {
        Ok(within("injb-2", || netlink::link_by_name("vb"))??.is_none())
    })?;
    equal(&attachment.verify()?, &Presence::NamespaceGone)?;
    let notes = attachment.detach()?.notes;
    check(
        notes.len() == 3 && notes.iter().all(|note| note.contains("has been deleted")),
        format!("{notes:?}"),
    )?;
    host.journal_is_empty()?;
    DONE
}

fn interface_deleted() -> Outcome {
    pair("injb-1")?;
    run("ip netns add injb-2")?;
    let host = Host::new()?;
    let mut moved = host.attach_to("injb-1", "va")?;
    let mut deleted = host.attach_to("injb-1", "vb")?;
    run("ip -n injb-1 link set va netns injb-2")?;
    equal(&moved.verify()?, &Presence::InterfaceGone)?;
    equal(&deleted.verify()?, &Presence::Present)?;
    check(
        !run("tc -n injb-2 qdisc show")?.contains("clsact"),
        "it took clsact along",
    )?;
    run("ip -n injb-1 link del vb")?;
    equal(&deleted.verify()?, &Presence::InterfaceGone)?;
    check(
        matches!(deleted.link_stats(), Err(AttachError::Gone { .. })),
        "no counters",
    )?;
    check(
        matches!(deleted.ahead(), Err(AttachError::Gone { .. })),
        "nothing to look at",
    )?;
    equal(&moved.detach()?.notes.len(), &3)?;
    equal(&deleted.detach()?.notes.len(), &3)?;
    host.journal_is_empty()?;
    DONE
}

fn filter_removed() -> Outcome {
    pair("injb-1")?;
    let host = Host::new()?;
    let before = snapshot("injb-1")?;
    let mut attachment = host.attach_to("injb-1", "va")?;
    run("tc -n injb-1 filter del dev va ingress")?;
    equal(
        &attachment.verify()?,
        &Presence::FilterRemoved {
            hook: Hook::Ingress,
        },
    )?;
    run("tc -n injb-1 filter del dev va egress")?;
    equal(&attachment.detach()?.notes.len(), &2)?;
    equal(&snapshot("injb-1")?, &before)?;
    // Somebody else's filter in the very place of ours is not ours.
    let mut attachment = host.attach_to("injb-1", "va")?;
    run("tc -n injb-1 filter del dev va egress")?;
    let other = load(SCHED_CLS, -1, "injb_other")?;
    within("injb-1", || -> Result<_, Failed> {
        let filter = NewFilter {
            program: other.as_fd(),
            name: EGRESS_NAME,
            priority: 1,
            handle: 1,
            classid: 0,
        };
        Ok(netlink::attach(index("va")?, Hook::Egress, &filter)?)
    })??;
    equal(
        &attachment.verify()?,
        &Presence::FilterRemoved { hook: Hook::Egress },
    )?;
    attachment.detach()?;
    check(
        filters("injb-1", Hook::Egress)?.contains(EGRESS_NAME),
        "theirs was removed",
    )?;
    DONE
}

// ---- what is in the way ------------------------------------------------------------------------

fn obstacles() -> Outcome {
    pair("injb-1")?;
    let host = Host::new()?;
    let attachment = host.attach_to("injb-1", "va")?;
    equal(&attachment.ahead()?, &vec![])?;
    let tcx = load(SCHED_CLS, -1, "injb_tcx")?;
    let xdp = load(XDP, 2, "injb_xdp")?;
    let links = within("injb-1", || -> Result<_, Failed> {
        let index = index("va")?;
        let mut links = vec![link(xdp.as_fd(), index, 37, 2)?];
        for attach_type in [46, 47] {
            match link(tcx.as_fd(), index, attach_type, 0) {
                Ok(fd) => links.push(fd),
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Some(links))
    })??;
    let Some(links) = links else {
        return Ok(Completion::ignored_with("this kernel has no TCX"));
    };
    let id = |program: &OwnedFd| netlink::program(program.as_fd()).map(|program| program.id);
    let texts: Vec<String> = attachment
        .ahead()?
        .into_iter()
        .map(|obstacle| format!("{} {}", obstacle.hook, obstacle.what))
        .collect();
    equal(
        &texts,
        &vec![
            format!("ingress XDP program id {} 'injb_xdp'", id(&xdp)?),
            format!("ingress TCX program id {} 'injb_tcx'", id(&tcx)?),
            format!("egress TCX program id {} 'injb_tcx'", id(&tcx)?),
        ],
    )?;
    drop(links);
    // A command that another test is just starting may hold them until it has been executed.
    wait("the programs to be gone", || {
        Ok(attachment.ahead()?.is_empty())
    })?;
    equal(&attachment.verify()?, &Presence::Present)?;
    DONE
}

fn unusable_qdiscs() -> Outcome {
    pair("injb-1")?;
    let host = Host::new()?;
    run("tc -n injb-1 qdisc add dev va ingress")?;
    run("tc -n injb-1 qdisc add dev vb ingress_block 21 egress_block 22 clsact")?;
    let before = snapshot("injb-1")?;
    let link =
        |ifname: &str| -> Result<TargetLink, Failed> { Ok(inspect(&netns("injb-1")?, ifname)?) };
    let error = host.attach(&link("va")?).map(|_| ()).err();
    check(
        matches!(error, Some(AttachError::IngressQdisc { .. })),
        format!("{error:?}"),
    )?;
    let error = host.attach(&link("vb")?).map(|_| ()).err();
    check(
        matches!(error, Some(AttachError::SharedBlock { .. })),
        format!("{error:?}"),
    )?;
    let refused = within("injb-1", || {
        netlink::add_clsact(link("va").map_or(0, |link| link.index))
    })?;
    let text = refused.err().ok_or("clsact replaced ingress")?.to_string();
    check(text.contains("(kernel: "), text)?;
    equal(&snapshot("injb-1")?, &before)?;
    host.journal_is_empty()?;
    DONE
}

fn loopback() -> Outcome {
    pair("injb-1")?;
    let host = Host::new()?;
    let before = snapshot("injb-1")?;
    let link = inspect(&netns("injb-1")?, "lo")?;
    equal(&(link.kind, link.loopback), &(LinkKind::Ethernet, true))?;
    let mut attachment = host.attach(&link)?;
    let on = |hook| within("injb-1", move || netlink::filters(1, hook));
    equal(&on(Hook::Egress)??.len(), &1)?;
    equal(&on(Hook::Ingress)??.len(), &0)?;
    equal(&attachment.verify()?, &Presence::Present)?;
    attachment.detach()?;
    equal(&snapshot("injb-1")?, &before)?;
    DONE
}

fn inspection() -> Outcome {
    pair("injb-1")?;
    let home = netns("injb-1")?;
    let link = inspect(&home, "va")?;
    equal(&(link.kind, link.loopback), &(LinkKind::Ethernet, false))?;
    let error = inspect(&home, "nope")
        .err()
        .ok_or("found nope")?
        .to_string();
    check(
        error.contains("'nope'") && error.contains("'injb-1'") && error.contains("lo, vb, va"),
        error,
    )?;
    run("ip -n injb-1 link property add dev va altname an-alternative-name-that-is-long")?;
    equal(
        &inspect(&home, "an-alternative-name-that-is-long")?.name,
        &"va".to_owned(),
    )?;
    if run("ip -n injb-1 tuntap add t mode tun").is_ok() {
        equal(&inspect(&home, "t")?.kind, &LinkKind::Raw)?;
    }
    for (ifname, made) in [
        ("s", "sit remote 192.0.2.1 local 192.0.2.2"),
        ("g", "gre remote 192.0.2.1 local 192.0.2.2"),
        ("v", "vcan"),
    ] {
        // Kernels lack some of these kinds; the unit tests have them all.
        if run(&format!("ip -n injb-1 link add {ifname} type {made}")).is_ok() {
            let error = inspect(&home, ifname).err();
            check(
                matches!(error, Some(AttachError::Unsuitable { .. })),
                format!("{error:?}"),
            )?;
        }
    }
    run("ip netns del injb-1")?;
    check(
        inspect(&home, "va").is_err(),
        "inspected a deleted namespace",
    )?;
    DONE
}

fn double_passes() -> Outcome {
    pair("injb-1")?;
    pair("injb-2")?;
    run("ip -n injb-1 link add vr type bridge")?;
    run("ip -n injb-1 link set va master vr")?;
    run("ip -n injb-1 link set vb netns injb-2 name vc")?;
    run("ip -n injb-2 link add link vc name vm type macvlan")?;
    let (one, two) = (netns("injb-1")?, netns("injb-2")?);
    let at = |netns: &Netns, ifname: &str| -> Result<(Netns, u32), Failed> {
        Ok((netns.clone(), netns.run(|| index(ifname))??))
    };
    let warnings = |targets: &[(Netns, u32)]| netlink::double_pass(targets).join("\n");
    let expect = |targets: &[(Netns, u32)], text: &str| {
        let found = warnings(targets);
        check(found.starts_with(text) && found.lines().count() == 1, found)
    };
    equal(
        &warnings(&[at(&one, "lo")?, at(&one, "va")?]),
        &String::new(),
    )?;
    equal(
        &warnings(&[at(&two, "va")?, at(&two, "vc")?]),
        &String::new(),
    )?;
    expect(&[at(&one, "va")?, at(&one, "vr")?], "va is a port of vr: ")?;
    expect(
        &[at(&two, "va")?, at(&two, "vb")?],
        "vb is the other end of va: ",
    )?;
    expect(&[at(&two, "vc")?, at(&two, "vm")?], "vm is stacked on vc: ")?;
    let across = warnings(&[at(&one, "va")?, at(&two, "vc")?]);
    check(
        across.contains("(namespace 'injb-1')") && across.contains("the other end of"),
        across,
    )?;
    let far = warnings(&[at(&one, "vr")?, at(&two, "vm")?]);
    equal(&far, &String::new())?;
    let far = warnings(&[at(&one, "vr")?, at(&two, "vc")?]);
    check(
        far.starts_with("what vr (namespace 'injb-1') carries passes vc"),
        far,
    )?;
    run("ip netns del injb-2")?;
    equal(&warnings(&[(one, 1), (two, 2)]), &String::new())?;
    DONE
}

fn routes() -> Outcome {
    pair("injb-1")?;
    for command in [
        "ip -n injb-1 address add 10.1.0.1/24 dev va",
        "ip -n injb-1 address add 10.2.0.1 peer 10.2.0.2/32 dev vb",
        "ip -n injb-1 address add fd01::1/64 dev va nodad",
        "ip -n injb-1 route add default via 10.1.0.254",
        "ip -n injb-1 route add 192.0.2.0/24 nexthop via 10.1.0.2 nexthop dev vb",
        "ip -n injb-1 route add blackhole 198.51.100.0/24",
        "ip -n injb-1 route add 203.0.113.0/24 dev vb table 100",
        "ip -n injb-1 -6 route add 2001:db8::/32 via fd01::2 metric 5",
        "ip -n injb-1 -6 route add unreachable 2001:db8:1::/48",
    ] {
        run(command)?;
    }
    settle("injb-1")?;
    within("injb-1", || -> Result<(), Failed> {
        let (a, b) = (index("va")?, index("vb")?);
        let own = netlink::addresses()?;
        for (ifindex, net) in [(1, "127.0.0.1/8"), (a, "10.1.0.1/24"), (a, "fd01::1/64")] {
            let net: IpNet = net.parse()?;
            check(
                own.contains(&(ifindex, net)),
                format!("{net} is not in {own:?}"),
            )?;
        }
        check(
            own.iter()
                .any(|(ifindex, net)| *ifindex == b && net.addr().to_string() == "10.2.0.1"),
            "the near end of a point-to-point link is ours",
        )?;
        let routes = netlink::routes()?;
        check(
            routes
                .iter()
                .all(|route| route.table != 255 && !route.dst.addr().is_multicast()),
            format!("{routes:?}"),
        )?;
        let via =
            |to: &str| -> Result<Vec<u32>, Failed> { Ok(netlink::outgoing(&routes, &to.parse()?)) };
        equal(&via("8.8.8.8/32")?, &vec![a])?;
        let mut both = vec![a, b];
        both.sort_unstable();
        equal(&via("192.0.2.9/32")?, &both)?;
        equal(&via("198.51.100.1/32")?, &vec![])?;
        equal(&via("203.0.113.1/32")?, &both)?;
        equal(&via("10.2.0.2/32")?, &vec![b])?;
        equal(&via("2001:db8::1/128")?, &vec![a])?;
        equal(&via("2001:db8:1::1/128")?, &vec![])?;
        equal(&via("2001:db9::1/128")?, &vec![])?;
        Ok(())
    })??;
    // Nexthop objects, whose interfaces the kernel need not repeat in the route.
    for command in [
        "ip -n injb-1 nexthop add id 1 dev vb",
        "ip -n injb-1 nexthop add id 2 via 10.1.0.3 dev va",
        "ip -n injb-1 nexthop add id 3 group 1/2",
        "ip -n injb-1 route add 100.64.0.0/16 nhid 3",
        "ip -n injb-1 route add 100.65.0.0/16 nhid 1",
    ] {
        run(command)?;
    }
    for compatible in ["1", "0"] {
        within("injb-1", || -> Result<(), Failed> {
            fs::write("/proc/sys/net/ipv4/nexthop_compat_mode", compatible)?;
            let (a, b) = (index("va")?, index("vb")?);
            let routes = netlink::routes()?;
            let mut both = vec![a, b];
            both.sort_unstable();
            equal(
                &netlink::outgoing(&routes, &"100.64.1.1/32".parse()?),
                &both,
            )?;
            equal(
                &netlink::outgoing(&routes, &"100.65.1.1/32".parse()?),
                &vec![b],
            )
        })??;
    }
    DONE
}

fn long_dumps() -> Outcome {
    let count = 300;
    let (found, named) = in_new(|| -> Result<_, Failed> {
        for number in 0..count {
            netlink::create_veth(&format!("x{number}"), &format!("y{number}"), None)?;
        }
        // Changes under the dump are noticed, and the dump is made again.
        let own = Netns::own()?;
        drop(own);
        let found = netlink::links()?.len();
        let named = netlink::link_by_name(&format!("y{}", count - 1))?.is_some();
        for number in 0..count {
            netlink::delete_link(index(&format!("x{number}"))?)?;
        }
        check(netlink::links()?.len() == 1, "only lo is left")?;
        Ok((found, named))
    })??;
    equal(&(found, named), &(2 * count + 1, true))?;
    DONE
}

// ---- labs and probes ---------------------------------------------------------------------------

/// What is in /run and which mounts there are.
fn run_directory() -> Result<String, Failed> {
    let mut text = run("find /run")?;
    for line in fs::read_to_string("/proc/thread-self/mountinfo")?.lines() {
        let point = line.split(' ').nth(4).unwrap_or_default();
        // Below our own /run lie the namespaces of tests beside us; a mount point that one of them
        // unlinks goes from every mount namespace.
        if !point.contains(tests::lab::PREFIX) {
            text.extend([point, "\n"]);
        }
    }
    Ok(text)
}

/// Whether a byte gets from one node to another.
fn reaches(from: &Netns, to: &Netns, address: IpAddr) -> Result<bool, Failed> {
    let listener = to.run(|| TcpListener::bind((address, 7000)))??;
    let reached = from.run(|| {
        TcpStream::connect_timeout(&(address, 7000).into(), Duration::from_secs(5)).is_ok()
    })?;
    drop(listener);
    Ok(reached)
}

fn labs() -> Outcome {
    let state = tempfile::tempdir()?;
    let state = state.path().join("state");
    let before = run_directory()?;
    check(
        !Path::new("/run/netns").exists(),
        "/run/netns exists already",
    )?;
    let links = run("ip -d link show")?;
    let made = lab::up(&state, "lab", 3)?;
    equal(&made.problems, &vec![])?;
    equal(&made.nodes.len(), &3)?;
    let listed = run("ip netns list")?;
    for node in ["sw", "n1", "n2", "n3"] {
        check(listed.contains(&format!("injector-lab-{node}")), &listed)?;
    }
    let node = |name: &str| lab::node(&state, "lab", name);
    for address in &made.nodes[2].addresses {
        check(
            reaches(&node("n1")?, &node("n3")?, *address)?,
            format!("{address} is out of reach"),
        )?;
    }
    check(
        run("ip netns exec injector-lab-n2 ip address show dev eth0")?.contains("10.77.0.2/24"),
        "eth0",
    )?;
    let hosts = fs::read_to_string(&made.hosts_file)?;
    check(hosts.starts_with("10.77.0.1 n1\n"), &hosts)?;
    let mut command = lab::command(&state, "lab", "n2", "ip")?;
    let output = command.args(["-o", "address"]).output()?;
    check(
        String::from_utf8_lossy(&output.stdout).contains("10.77.0.2/24"),
        "exec",
    )?;
    let error = lab::node(&state, "lab", "n4")
        .err()
        .map(|error| error.to_string());
    check(error.is_some_and(|text| text.contains("n1 to n3")), "n4")?;
    check(
        lab::up(&state, "lab", 2).is_err_and(|error| error.to_string().contains("3 nodes")),
        "twice",
    )?;
    // A second one, and a namespace of somebody else's.
    let second = lab::up(&state, "other", 1)?;
    equal(&lab::status(&state)?.len(), &2)?;
    run("ip netns add injector-third-n2")?;
    let taken = lab::up(&state, "third", 3)
        .err()
        .map(|error| error.to_string());
    check(
        taken.is_some_and(|text| text.contains("injector-third-n2")),
        "taken name",
    )?;
    equal(&lab::status(&state)?.len(), &2)?;
    let mut inhabitant = node("n1")?.command("sleep")?.arg("600").spawn()?;
    let removed = lab::down(&state, "lab")?.ok_or("no lab")?;
    inhabitant.kill()?;
    inhabitant.wait()?;
    equal(&removed.namespaces.len(), &4)?;
    check(
        removed.notes.len() == 1 && removed.notes[0].contains("(sleep) still runs in n1"),
        format!("{:?}", removed.notes),
    )?;
    check(lab::down(&state, "lab")?.is_none(), "down twice")?;
    check(
        !made.hosts_file.exists() && second.hosts_file.exists(),
        "hosts files",
    )?;
    let removed = lab::down(&state, "other")?.ok_or("no lab")?;
    check(
        removed.notes.iter().any(|note| note.contains("/run/netns")),
        "/run/netns is in use",
    )?;
    run("ip netns del injector-third-n2")?;
    // Alone, a lab leaves nothing at all.
    // Not by umount(8), which leaves files of its own.
    nix::mount::umount("/run/netns")?;
    fs::remove_dir("/run/netns")?;
    equal(&run_directory()?, &before)?;
    lab::up(&state, "lab", 64)?;
    equal(&lab::down(&state, "lab")?.ok_or("no lab")?.notes, &vec![])?;
    equal(&run_directory()?, &before)?;
    equal(&fs::read_dir(&state)?.count(), &0)?;
    equal(&run("ip -d link show")?, &links)?;
    DONE
}

fn broken_labs() -> Outcome {
    let state = tempfile::tempdir()?;
    let state = state.path();
    let file = state.join("lab.json");
    // Killed while it made its last namespace: made, but its identity not yet written down.
    let made = lab::up(state, "lab", 2)?;
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&file)?)?;
    let lab = &mut record["labs"]["lab"];
    lab["complete"] = false.into();
    lab["namespaces"][2]["id"] = serde_json::Value::Null;
    fs::write(&file, serde_json::to_vec(&record)?)?;
    fs::remove_file(&made.hosts_file)?;
    check(
        lab::status(state)?[0].problems.len() == 1,
        "it is half made",
    )?;
    equal(
        &lab::down(state, "lab")?.ok_or("no lab")?.namespaces.len(),
        &3,
    )?;
    check(!Path::new("/run/netns").exists(), "/run/netns is left")?;
    // Deleted, and made anew, by somebody else.
    lab::up(state, "lab", 3)?;
    run("ip netns del injector-lab-n1")?;
    run("ip netns del injector-lab-n2")?;
    run("ip netns add injector-lab-n2")?;
    equal(&lab::status(state)?[0].problems.len(), &2)?;
    let removed = lab::down(state, "lab")?.ok_or("no lab")?;
    equal(&removed.namespaces.len(), &2)?;
    let notes = removed.notes.join("\n");
    check(
        notes.contains("n1 had been deleted") && notes.contains("n2 is another"),
        &notes,
    )?;
    check(
        netns("injector-lab-n2").is_ok(),
        "somebody else's namespace was deleted",
    )?;
    run("ip netns del injector-lab-n2")?;
    check(!file.exists(), "lab.json is left")?;
    DONE
}

fn probing() -> Outcome {
    let before = run("ip -d link show")?;
    let results = probe::probe();
    for result in &results {
        if result.needed == probe::Needed::Required {
            check(result.status == probe::Status::Ok, format!("{result:?}"))?;
        }
        check(
            result.status != probe::Status::Unknown || result.feature == "8021q",
            format!("{result:?}"),
        )?;
    }
    equal(&run("ip -d link show")?, &before)?;
    // The programs go with their descriptors, in the kernel's own time.
    wait("the probe's programs to be unloaded", || {
        Ok(!program_names()?.contains(&"injector_probe".to_owned()))
    })?;
    DONE
}

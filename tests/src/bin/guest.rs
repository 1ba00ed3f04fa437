//! The first process of a virtual machine: prepares the system, does what `/command.json` says, and tells the
//! host how that went.
//!
//! The verdict goes to the host as a JSON document through the second serial port: an exit code of qemu could be its
//! own. The machine then ends itself through the port of qemu's `isa-debug-exit` device.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    mount::{MsFlags, mount},
    sys::wait::{WaitStatus, waitpid},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use tests::lab::module::load;

/// The port of `isa-debug-exit`, as the host configures it.
const EXIT_PORT: u16 = 0xf4;
/// The verdict where nothing else is known.
const BROKEN: i32 = 125;

/// What to do.
#[derive(Debug, Deserialize)]
struct Task {
    /// The program and its arguments.
    command: Vec<String>,
    /// Its environment.
    environment: BTreeMap<String, String>,
    /// Its working directory.
    folder: PathBuf,
    /// Modules to load, with parameters.
    modules: Vec<(PathBuf, String)>,
    /// A file that is sent to the host afterwards, if it is there.
    back: Option<PathBuf>,
    /// Whether somebody sits at the console.
    interactive: bool,
}

/// What the host is told.
#[derive(Debug, Serialize)]
struct Verdict {
    /// The exit code of the command; 128 and its number where a signal ended it.
    code: i32,
    /// What the file that was asked for holds.
    back: Option<String>,
    /// What the kernel's log says of the first warning (`WARN_ON` and its like) since the machine came up.
    warned: Option<String>,
}

fn main() {
    let verdict = run().unwrap_or_else(|error| {
        println!("guest: {error:#}");
        Verdict {
            code: BROKEN,
            back: None,
            warned: None,
        }
    });
    let _ = io::stdout().flush();
    if let Err(error) = tell(&verdict) {
        println!("guest: {error:#}");
    }
    // What was written to the console has to leave it.
    thread::sleep(Duration::from_millis(100));
    exit();
}

/// Sends the verdict to the host.
fn tell(verdict: &Verdict) -> Result<()> {
    let mut port = OpenOptions::new()
        .write(true)
        .open("/dev/ttyS1")
        .context("opening the second serial port")?;
    let mut text = serde_json::to_vec(verdict)?;
    text.push(b'\n');
    port.write_all(&text).context("telling the verdict")?;
    // SAFETY: an open descriptor of a terminal.
    unsafe { nix::libc::tcdrain(port.as_raw_fd()) };
    Ok(())
}

/// What the host waits for: before, a machine that ends has not come up.
const UP: &str = "guest: up";

fn run() -> Result<Verdict> {
    println!("{UP}");
    // The root is memory already. What is below `/tmp` must stay to be seen: the checkout may be there on the host.
    fs::create_dir_all("/tmp").context("making /tmp")?;
    for (kind, place) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/run"),
        ("bpf", "/sys/fs/bpf"),
        ("cgroup2", "/sys/fs/cgroup"),
    ] {
        mount(
            Some(kind),
            place,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        )
        .with_context(|| format!("mounting {kind} on {place}"))?;
    }
    let text = fs::read("/command.json").context("reading /command.json")?;
    let task: Task = serde_json::from_slice(&text).context("reading /command.json")?;
    for (path, parameters) in &task.modules {
        load(path, parameters)?;
    }
    // A veth receives through a backlog of a thousand packets, which a burst overflows where the queue of a
    // network card would not.
    for (setting, value) in [
        ("net/core/netdev_max_backlog", "16384"),
        ("kernel/hostname", "guest"),
        ("kernel/printk", "4"),
    ] {
        fs::write(Path::new("/proc/sys").join(setting), value)
            .with_context(|| format!("setting {setting}"))?;
    }
    let (program, arguments) = task.command.split_first().context("no command")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(&task.environment)
        .current_dir(&task.folder);
    if task.interactive {
        // SAFETY: only calls that are allowed between fork and exec.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                // The console becomes the terminal of the new session.
                if nix::libc::ioctl(0, nix::libc::TIOCSCTTY, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
    }
    let before = tainted()?;
    let child = command
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let child = Pid::from_raw(child.id().cast_signed());
    // Whoever loses its parent becomes our child.
    let code = loop {
        match waitpid(None, None).with_context(|| format!("waiting for {program}"))? {
            WaitStatus::Exited(pid, code) if pid == child => break code,
            WaitStatus::Signaled(pid, signal, _) if pid == child => break 128 + signal as i32,
            _ => {}
        }
    };
    let back = task
        .back
        .as_ref()
        .and_then(|path| fs::read_to_string(path).ok());
    let warned = tainted()? & !before & WARNED != 0;
    Ok(Verdict {
        code,
        back,
        warned: warned.then(first_warning).transpose()?,
    })
}

/// The bit of `/proc/sys/kernel/tainted` that the kernel sets with a warning (`TAINT_WARN`).
const WARNED: u64 = 1 << 9;

/// What has befallen the kernel, as bits.
fn tainted() -> Result<u64> {
    let path = "/proc/sys/kernel/tainted";
    let text = fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
    text.trim()
        .parse()
        .with_context(|| format!("{path} says '{}'", text.trim()))
}

/// The kernel's log from its first warning on. The console does not show it: warnings are below its level.
fn first_warning() -> Result<String> {
    /// `SYSLOG_ACTION_READ_ALL`, see syslog(2).
    const READ_ALL: i32 = 3;
    const LINES: usize = 40;
    let mut log = vec![0_u8; 1 << 20];
    let size = i32::try_from(log.len())?;
    // SAFETY: the kernel writes at most `size` bytes into a buffer that has so many.
    let length = unsafe { nix::libc::klogctl(READ_ALL, log.as_mut_ptr().cast(), size) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    let text = String::from_utf8_lossy(&log[..length]);
    let lines: Vec<&str> = text
        .lines()
        .skip_while(|line| !line.contains("cut here") && !line.contains("WARNING: "))
        .take(LINES)
        .collect();
    Ok(lines.join("\n"))
}

/// Ends the machine.
fn exit() -> ! {
    // SAFETY: port input and output is allowed to this process for this port; nothing else is touched.
    unsafe {
        nix::libc::sync();
        if nix::libc::ioperm(EXIT_PORT.into(), 1, 1) == 0 {
            std::arch::asm!(
                "out dx, al",
                in("dx") EXIT_PORT,
                in("al") 0_u8,
                options(nomem, nostack)
            );
        }
        // There is no such device.
        nix::libc::reboot(nix::libc::RB_POWER_OFF);
    }
    loop {
        thread::park();
    }
}

//! A network namespace with a name below `/run/netns`, and ways to run code and commands in it.

use std::{
    fs::File,
    os::{fd::AsFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use anyhow::{Context, Result, anyhow};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};

use super::{
    command,
    transcript::{Transcript, note},
};

/// A network namespace, by name. No descriptor is held, since one would keep a deleted namespace alive.
#[derive(Debug, Clone)]
pub struct Netns {
    name: String,
    path: PathBuf,
}

impl Netns {
    /// A namespace of this name, whether it is there or not.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            path: Path::new("/run/netns").join(name),
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn open(&self) -> Result<File> {
        File::open(&self.path)
            .with_context(|| format!("could not open network namespace {}", self.path.display()))
    }

    /// Runs `work` on a thread of its own inside the namespace. Sockets made there stay in it.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = self.open()?;
        let transcript = Transcript::current();
        thread::scope(|scope| {
            let running = scope.spawn(move || {
                transcript.adopt();
                setns(file.as_fd(), CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("setns into {}", self.name))?;
                drop(file);
                work()
            });
            running
                .join()
                .unwrap_or_else(|_| Err(anyhow!("the thread in {} panicked", self.name)))
        })
    }

    /// A command that will run in the namespace.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let file = self.open()?;
        let mut command = Command::new(program);
        // SAFETY: between fork and exec only setns(2) is called, on a descriptor that the closure owns;
        // it neither allocates nor takes locks.
        unsafe {
            command.pre_exec(move || {
                setns(file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from)
            });
        }
        Ok(command)
    }

    /// Runs a command line, split at white space, in the namespace; fails unless it exits with 0.
    pub fn tool(&self, line: &str) -> Result<command::Output> {
        command::run(self.line(line)?, command::DEADLINE)?.success()
    }

    /// The same, whatever its exit code.
    pub fn try_tool(&self, line: &str) -> Result<command::Output> {
        command::run(self.line(line)?, command::DEADLINE)
    }

    /// A command line, split at white space, as a command in the namespace.
    pub fn line(&self, line: &str) -> Result<Command> {
        let mut words = line.split_whitespace();
        let program = words.next().context("an empty command line")?;
        let mut command = self.command(program)?;
        command.args(words);
        Ok(command)
    }

    /// Makes what arrives at an interface with one queue go through the backlog of one CPU, in the order in which it was
    /// handed over. A veth otherwise takes the backlog of whatever CPU hands over (`veth_forward_skb`,
    /// drivers/net/veth.c; `netif_rx_internal` and `get_rps_cpu`, net/core/dev.c, 6.1), and two CPUs do not go through
    /// theirs in step.
    pub fn receive_on_one_cpu(&self, interface: &str) -> Result<()> {
        self.sysfs(&format!("class/net/{interface}/queues/rx-0/rps_cpus"), "1")
    }

    /// Writes a file of the namespace's own sysfs, named as below /sys (`class/net/eth0/mtu`).
    pub fn sysfs(&self, name: &str, value: &str) -> Result<()> {
        let path = Path::new("/sys").join(name);
        self.enter(|| {
            // A sysfs shows the network namespace in which it was mounted. The mount is for this thread alone, and goes
            // with it.
            unshare(CloneFlags::CLONE_NEWNS).context("unshare of the mounts")?;
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
                .context("making the mounts private")?;
            mount(
                Some("sysfs"),
                "/sys",
                Some("sysfs"),
                MsFlags::empty(),
                None::<&str>,
            )
            .context("mounting sysfs")?;
            std::fs::write(&path, value)
                .with_context(|| format!("writing {value} to {}", path.display()))
        })
    }

    /// Sets a sysctl of the namespace, named as in /proc/sys (`net/ipv4/ip_forward`).
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(name);
        self.enter(|| {
            std::fs::write(&path, value)
                .with_context(|| format!("writing {value} to {}", path.display()))
        })
    }

    /// Runs several commands of `ip` in one process: in emulation each start takes a tenth of a second. Fails at the
    /// first that fails.
    pub fn ip(&self, lines: &[String]) -> Result<()> {
        self.batch("ip", &lines.join("\n"))
    }

    /// The same for `ip` or `tc`, one command a line.
    pub fn batch(&self, program: &str, input: &str) -> Result<()> {
        batch(self.command(program)?, input)
    }

    /// Deletes the name; the namespace goes when nothing is left in it.
    pub fn delete(&self) -> Result<()> {
        Self::delete_all(std::slice::from_ref(self))
    }

    /// Makes them, in this order.
    pub fn create_all(spaces: &[Self]) -> Result<()> {
        let lines: Vec<String> = spaces
            .iter()
            .map(|space| format!("netns add {}", space.name))
            .collect();
        batch(Command::new("ip"), &lines.join("\n"))
    }

    /// Deletes them; one that cannot be deleted does not keep the others.
    pub fn delete_all(spaces: &[Self]) -> Result<()> {
        let lines: Vec<String> = spaces
            .iter()
            .map(|space| format!("netns del {}", space.name))
            .collect();
        let mut ip = Command::new("ip");
        ip.arg("-force");
        batch(ip, &lines.join("\n"))
    }
}

/// Lets `ip` or `tc` run several commands, one a line.
fn batch(mut command: Command, lines: &str) -> Result<()> {
    command.args(["-batch", "-"]);
    note(lines);
    command::run_with_input(command, lines.as_bytes(), command::DEADLINE)?
        .success()
        .map(drop)
}

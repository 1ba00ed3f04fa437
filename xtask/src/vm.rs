//! `cargo xtask vm`: Debian's kernels in virtual machines, with the same programs as on the host.
//!
//! A machine is qemu with a kernel and an initial RAM disk, nothing else: no disk, no network. Programs are
//! under the paths that they have on the host, so that the same environment serves both.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{BufRead, BufReader, IsTerminal as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::build::Built;
use crate::image::Image;
use crate::kernels::{Kernel, Line};
use crate::process;
use crate::run;
use crate::setup::{Setup, TOOLS};
use crate::workspace;

/// Programs of the host that tests, or somebody at the console, call.
const PROGRAMS: [&str; 47] = [
    "awk",
    "basename",
    "bash",
    "cat",
    "chmod",
    "cmp",
    "cp",
    "cut",
    "date",
    "dd",
    "dmesg",
    "env",
    "false",
    "getent",
    "grep",
    "head",
    "id",
    "kill",
    "ls",
    "mkdir",
    "mount",
    "mv",
    "nsenter",
    "paste",
    "pgrep",
    "ps",
    "rm",
    "sed",
    "seq",
    "sh",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "sysctl",
    "tail",
    "tee",
    "timeout",
    "touch",
    "tr",
    "true",
    "umount",
    "uname",
    "uniq",
    "wc",
    "whoami",
    "xargs",
];

/// What the host's PATH may lack and programs are in all the same.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The memory of a machine in MiB, where nothing else is asked for.
pub(crate) const MEMORY: u32 = 2048;

/// All of a machine's CPUs take turns on one thread of the host. On a thread each, a CPU can keep the translation of an
/// instruction that another one patches at that moment: a kernel that attaches its first filter while packets pass dies
/// of it ("Oops: int3"), or repeats the breakpoint for ever. In turns it costs nothing where as many machines run as
/// there are CPUs.
const EMULATION: &str = "tcg,thread=single";

/// How long a kernel may take to come up.
const COMING_UP: Duration = Duration::from_mins(3);

/// What the guest's first process says first.
const UP: &str = "guest: up";

/// So many of the last lines of a machine that hung are shown.
const LAST_LINES: usize = 40;

/// Numbers of machines, for their files' names.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// Held while an image is made.
static IMAGES: Mutex<()> = Mutex::new(());

/// A machine to be started.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    /// Its kernel.
    pub(crate) kernel: &'a Kernel,
    /// Its memory in MiB.
    pub(crate) memory: u32,
    /// When it is ended, whatever it does.
    pub(crate) deadline: Duration,
    /// The program to run and its arguments; programs of the host by their paths.
    pub(crate) command: Vec<OsString>,
    /// The working directory.
    pub(crate) folder: PathBuf,
    /// More environment than programs that run as root get.
    pub(crate) environment: Vec<(&'static str, OsString)>,
    /// Files to put into it: their names there, and here.
    pub(crate) files: Vec<(PathBuf, PathBuf)>,
    /// A file that comes back afterwards.
    pub(crate) back: Option<PathBuf>,
    /// Whether the caller's terminal becomes the machine's console.
    pub(crate) interactive: bool,
}

/// How a machine ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// The exit code of its command; `None` if it ended without a verdict.
    pub(crate) code: Option<i32>,
    /// Why there is none.
    pub(crate) trouble: Option<String>,
    /// What the file that was asked for holds.
    pub(crate) back: Option<String>,
}

impl Ended {
    /// The exit code of the command; an error where there is none.
    pub(crate) fn verdict(&self, kernel: &Kernel) -> Result<i32> {
        match self.code {
            Some(code) => Ok(code),
            None => bail!(
                "the machine with kernel {}: {}",
                kernel.version,
                self.trouble.as_deref().unwrap_or_default()
            ),
        }
    }
}

/// What the guest's first process says at its end.
#[derive(Debug, Deserialize)]
struct Verdict {
    code: i32,
    back: Option<String>,
    warned: Option<String>,
}

/// What the guest's first process reads.
#[derive(Serialize)]
struct Task<'a> {
    command: Vec<String>,
    environment: BTreeMap<String, String>,
    folder: &'a Path,
    modules: Vec<(PathBuf, &'a str)>,
    back: Option<&'a Path>,
    interactive: bool,
}

impl Machine<'_> {
    /// Boots, and hands every line of the console to `line`.
    pub(crate) fn run(
        &self,
        setup: &Setup,
        built: &Built,
        programs: &[&Path],
        mut line: impl FnMut(&str),
    ) -> Result<Ended> {
        let notes = workspace::notes();
        fs::create_dir_all(&notes).with_context(|| format!("making {}", notes.display()))?;
        sweep(&notes);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let file = |kind: &str| notes.join(format!("vm-{}.{number}.{kind}", std::process::id()));
        let (disk, back) = (file("cpio"), file("back"));
        let _cleaning = Cleaning([disk.clone(), back.clone()]);
        {
            // Programs are stripped by way of one file.
            let _one_at_a_time = IMAGES.lock().unwrap_or_else(PoisonError::into_inner);
            self.image(setup, built, programs)?.write(&disk)?;
        }
        self.boot(&disk, &back, &mut line)
    }

    /// Boots with a RAM disk; the guest's verdict comes in the file `back`.
    fn boot(&self, disk: &Path, back: &Path, line: &mut impl FnMut(&str)) -> Result<Ended> {
        fs::write(back, []).with_context(|| format!("making {}", back.display()))?;
        let mut command = self.qemu(disk, back);
        let shown = process::shown(&command);
        let mut trouble = None;
        if self.interactive {
            process::status(command.stdin(Stdio::inherit()), "running a virtual machine")?;
        } else {
            let child = command
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()
                .with_context(|| {
                    format!("running a virtual machine: `{shown}` cannot be started")
                })?;
            trouble = self.watch(child, line)?;
        }
        let text = fs::read(back).with_context(|| format!("reading {}", back.display()))?;
        let verdict: Option<Verdict> = serde_json::from_slice(&text).ok();
        let warned = verdict.as_ref().and_then(|verdict| verdict.warned.as_ref());
        let trouble =
            trouble.or_else(|| warned.map(|warned| format!("the kernel warned:\n{warned}")));
        Ok(match (verdict, trouble) {
            (Some(verdict), None) => Ended {
                code: Some(verdict.code),
                trouble: None,
                back: verdict.back,
            },
            (verdict, trouble) => Ended {
                code: None,
                trouble: Some(trouble.unwrap_or_else(|| "it ended without a verdict".to_owned())),
                back: verdict.and_then(|verdict| verdict.back),
            },
        })
    }

    /// Reads the console until the machine has ended or its time is up. Returns what went wrong.
    fn watch(&self, mut child: Child, line: &mut impl FnMut(&str)) -> Result<Option<String>> {
        let console = child.stdout.take().context("qemu has no console")?;
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let began = Instant::now();
        let mut last: Vec<String> = Vec::new();
        let mut trouble: Option<String> = None;
        let mut up = false;
        loop {
            let deadline = if up {
                self.deadline
            } else {
                self.deadline.min(COMING_UP)
            };
            let left = deadline.saturating_sub(began.elapsed());
            match receiver.recv_timeout(left) {
                Ok(bytes) => {
                    let text = String::from_utf8_lossy(&bytes);
                    let text = text.trim_end_matches('\r');
                    if is_oops(text) && trouble.is_none() {
                        trouble = Some(format!("the kernel complained: {}", text.trim()));
                    }
                    if text == UP {
                        up = true;
                        continue;
                    }
                    line(text);
                    last.push(text.to_owned());
                    if last.len() > LAST_LINES {
                        last.remove(0);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    child.kill().context("ending a virtual machine")?;
                    let late = format!(
                        "it did not {} within {} s; its last lines:\n{}",
                        if up { "end" } else { "come up" },
                        deadline.as_secs(),
                        last.join("\n")
                    );
                    trouble = Some(match trouble {
                        Some(first) => format!("{first}; then {late}"),
                        None => late,
                    });
                    break;
                }
            }
        }
        let status = child.wait().context("waiting for a virtual machine")?;
        // With its end the guest makes qemu leave with 1, as qemu does where it cannot start.
        if trouble.is_none() && status.code() != Some(1) {
            trouble = Some(format!(
                "qemu ended with {status}; the last lines:\n{}",
                last.join("\n")
            ));
        }
        Ok(trouble)
    }

    fn qemu(&self, disk: &Path, back: &Path) -> Command {
        // What a boot can do without costs seconds in emulation. There is no clock but the emulated one. Translated
        // code is found again by its virtual address: with addresses at random each start of a program is translated
        // anew (the injector's command line: 0.55 s each time, and 0.16 s without).
        let options = "console=ttyS0 quiet panic=-1 oops=panic softlockup_panic=1 nokaslr mitigations=off \
                       norandmaps initcall_blacklist=jent_mod_init,load_system_certificate_list \
                       cryptomgr.notests apparmor=0 audit=0 no_timer_check tsc=reliable";
        // A machine ends with the xtask that runs it, however that ends: whoever waits for it here has started it.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        let mut serial = OsString::from("file:");
        serial.push(back);
        command
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args(["-m", &self.memory.to_string()])
            .args([
                "-machine",
                "q35",
                "-accel",
                EMULATION,
                "-smp",
                "2",
                "-cpu",
                // In emulation a "fast" string instruction takes its bytes one by one.
                "max,-erms",
            ])
            .arg("-kernel")
            .arg(&self.kernel.image)
            .arg("-initrd")
            .arg(disk)
            // In a shell Ctrl-C is for the guest.
            .args(["-chardev", "stdio,id=console,signal=off"])
            .args(["-serial", "chardev:console", "-serial"])
            .arg(serial)
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"])
            .args(["-append", options]);
        command
    }

    fn image(&self, setup: &Setup, built: &Built, programs: &[&Path]) -> Result<Image> {
        let mut image = Image::new();
        let mut environment = run::environment(setup, built)?;
        environment.extend(self.environment.iter().cloned());
        if !self.interactive {
            // The guest's console looks like a terminal, and we pass it on line by line.
            environment.push(("TERM", OsString::from("dumb")));
            if !std::io::stdout().is_terminal() {
                environment.push(("NO_COLOR", OsString::from("1")));
            }
        }
        let libraries = setup
            .services()
            .map_or_else(OsString::new, crate::services::Services::libraries);
        for name in PROGRAMS
            .into_iter()
            .chain(TOOLS.map(|(program, _)| program))
        {
            if let Some(path) = find(name) {
                image.program(&path, &libraries)?;
            }
        }
        if let Some(services) = setup.services() {
            image.tree(&services.root)?;
            for program in crate::services::programs(&services.root) {
                image.program(&services.root.join(program), &libraries)?;
            }
        }
        for program in [built.binary("injector")?, built.binary("verify")?]
            .into_iter()
            .chain(programs.iter().copied())
        {
            image.program(program, OsStr::new(""))?;
        }
        let init = built.binary("guest")?;
        image.program(init, OsStr::new(""))?;
        image.link(Path::new("/init"), init);
        // nginx, for one, asks for its user and that user's group.
        for (file, entries) in [
            (
                "/etc/passwd",
                "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/:/bin/false\n",
            ),
            ("/etc/group", "root:x:0:\nnogroup:x:65534:\n"),
        ] {
            image.file(Path::new(file), entries.as_bytes().to_vec(), 0o644);
        }
        for (name, path) in &self.files {
            let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
            image.file(name, bytes, 0o644);
        }
        image.file(
            Path::new("/etc/hosts"),
            b"127.0.0.1 localhost\n".to_vec(),
            0o644,
        );
        let mut modules = Vec::new();
        for (path, parameters) in &self.kernel.modules {
            let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
            let name = Path::new("/modules").join(path.file_name().unwrap_or_default());
            image.file(&name, bytes, 0o644);
            modules.push((name, parameters.as_str()));
        }
        image.empty(&self.folder);
        let text = |text: &OsStr| text.to_string_lossy().into_owned();
        let mut environment: BTreeMap<String, String> = environment
            .iter()
            .map(|(name, value)| ((*name).to_owned(), text(value)))
            .collect();
        environment.insert("PATH".to_owned(), PATH.to_owned());
        environment.insert("HOME".to_owned(), "/root".to_owned());
        if self.interactive {
            environment.insert(
                "TERM".to_owned(),
                std::env::var("TERM").unwrap_or_else(|_| "vt100".to_owned()),
            );
        }
        let task = Task {
            command: self.command.iter().map(|word| text(word)).collect(),
            environment,
            folder: &self.folder,
            modules,
            back: self.back.as_deref(),
            interactive: self.interactive,
        };
        let task = serde_json::to_vec(&task).context("describing what the machine does")?;
        image.file(Path::new("/command.json"), task, 0o644);
        Ok(image)
    }
}

/// Removes the files of machines whose xtask was killed.
fn sweep(notes: &Path) {
    for entry in fs::read_dir(notes).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.strip_prefix("vm-"))
            .and_then(|rest| rest.split('.').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // What cannot be removed is tried again the next time.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Files that are removed when this is dropped.
struct Cleaning([PathBuf; 2]);

impl Drop for Cleaning {
    fn drop(&mut self) {
        for path in &self.0 {
            // What cannot be removed is taken by `sweep` the next time.
            let _ = fs::remove_file(path);
        }
    }
}

/// Whether a line of the console says that the kernel is in trouble. It may stand behind what a program had begun to
/// print. (Of mere warnings the guest tells.)
fn is_oops(line: &str) -> bool {
    line.match_indices('[').any(|(at, _)| {
        let Some((stamp, message)) = line[at + 1..].split_once(']') else {
            return false;
        };
        stamp.contains('.')
            && stamp.trim().parse::<f64>().is_ok()
            && [
                "Kernel panic",
                "BUG: ",
                "Oops: ",
                "general protection fault",
                "unregister_netdevice: waiting",
            ]
            .iter()
            .any(|words| message.contains(words))
    })
}

/// A program in PATH, or where root's programs are.
fn find(name: &str) -> Option<PathBuf> {
    process::find_program(name).or_else(|| {
        ["/usr/sbin", "/sbin"]
            .iter()
            .map(|folder| Path::new(folder).join(name))
            .find(|path| path.exists())
    })
}

/// The kernel of a line, unpacked.
pub(crate) fn kernel(line: &Line) -> Result<Kernel> {
    Setup::kernel(line).with_context(|| format!("getting kernel {line}"))
}

/// Runs a command on a kernel and returns its exit code.
pub(crate) fn run(
    setup: &Setup,
    built: &Built,
    line: &Line,
    memory: u32,
    deadline: Duration,
    command: &[OsString],
) -> Result<i32> {
    let kernel = kernel(line)?;
    let interactive = command.is_empty();
    // Our own programs by their names, everything else by the guest's PATH.
    let mut ours = None;
    let command = match command.split_first() {
        None => vec![OsString::from("/bin/bash"), OsString::from("-i")],
        Some((first, rest)) => {
            ours = first.to_str().and_then(|name| built.binary(name).ok());
            let mut all = vec![ours.map_or(first.as_os_str(), Path::as_os_str).to_owned()];
            all.extend_from_slice(rest);
            all
        }
    };
    let programs: Vec<&Path> = ours.into_iter().collect();
    let machine = Machine {
        kernel: &kernel,
        memory,
        deadline,
        command,
        folder: PathBuf::from("/root"),
        environment: vec![],
        files: vec![],
        back: None,
        interactive,
    };
    eprintln!("kernel {} ({})", kernel.line, kernel.version);
    let ended = machine.run(setup, built, &programs, |line| println!("{line}"))?;
    ended.verdict(&kernel)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_is_seen() {
        assert!(is_oops("[    3.2] Kernel panic - not syncing: x"));
        assert!(is_oops(
            "test smoke::x ... [    3.672734] Oops: int3: 0000 [#1] SMP"
        ));
        assert!(!is_oops("test lane::delay ... ok"));
        assert!(!is_oops("[1] a database says: BUG: none"));
        assert!(!is_oops("BUG: of a program"));
    }
}

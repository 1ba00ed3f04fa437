//! What both parts of the demo have in common: the lines that they print, the commands that they show, the lab that
//! they play in, and what happens on a signal.

use std::{
    io::{self, IsTerminal},
    os::unix::process::CommandExt,
    sync::atomic::{AtomicI32, Ordering},
};

use anyhow::{Context, Result};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use tests::lab::{
    DEMO_LAB,
    command::{self, Output},
    injector::Injector,
    netns::Netns,
    topology::Node,
    wait::give_up,
};

/// The signal by which the user has said that it is enough; 0: none.
static INTERRUPTED: AtomicI32 = AtomicI32::new(0);

/// What ends the demo early; everything is cleared away nevertheless.
const ENDINGS: [Signal; 4] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
];

extern "C" fn interrupted(signal: libc::c_int) {
    INTERRUPTED.store(signal, Ordering::Relaxed);
    give_up();
}

/// The number of the signal that ended the demo; 0 where none did.
pub(crate) fn interrupted_by() -> i32 {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Lets signals end every wait, so that what was made is cleared away.
pub(crate) fn end_on_signals() -> Result<()> {
    let action = SigAction::new(
        SigHandler::Handler(interrupted),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    for signal in ENDINGS {
        // SAFETY: the handler only stores to atomics.
        unsafe { sigaction(signal, &action) }.context("sigaction")?;
    }
    Ok(())
}

/// How a line is meant.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Tone {
    Plain,
    Title,
    Command,
    Good,
    Bad,
}

/// Prints a line; in colour only to a terminal whose user has nothing against it.
pub(crate) fn say(tone: Tone, text: &str) {
    let mut out = io::stdout().lock();
    let colour = out.is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let code = match tone {
        Tone::Plain => "",
        Tone::Title => "1",
        Tone::Command => "36",
        Tone::Good => "32",
        Tone::Bad => "31",
    };
    // A reader that has gone away is no reason to leave a lab behind.
    let _written = if colour && !code.is_empty() {
        io::Write::write_fmt(&mut out, format_args!("\x1b[{code}m{text}\x1b[0m\n"))
    } else {
        io::Write::write_fmt(&mut out, format_args!("{text}\n"))
    };
}

pub(crate) fn title(text: &str) {
    say(Tone::Plain, "");
    say(Tone::Title, text);
    say(Tone::Plain, "");
}

pub(crate) fn paragraph(lines: &[&str]) {
    say(Tone::Plain, "");
    for line in lines {
        say(Tone::Plain, line);
    }
}

/// Runs the injector, out of reach of a Ctrl-C that is meant for us.
fn injector_apart(injector: &Injector, words: &[&str]) -> Result<Output> {
    let mut command = injector.cli(words);
    command.process_group(0);
    command::run(command, command::DEADLINE)
}

/// Runs the injector as the user would, and shows the command.
pub(crate) fn run(injector: &Injector, words: &[&str]) -> Result<String> {
    say(Tone::Command, &format!("$ injector {}", words.join(" ")));
    let output = injector_apart(injector, words)?
        .success()
        .with_context(|| injector.daemon_log())?;
    for line in output.stdout.lines().chain(output.stderr.lines()) {
        say(Tone::Plain, &format!("  {line}"));
    }
    Ok(output.stdout)
}

/// The injector's own lab, taken down whatever happens.
pub(crate) struct DemoLab<'a> {
    injector: &'a Injector,
    name: String,
    nodes: usize,
}

impl<'a> DemoLab<'a> {
    pub(crate) fn up(injector: &'a Injector, nodes: usize) -> Result<Self> {
        let name = format!("{DEMO_LAB}{}", std::process::id());
        let lab = Self {
            injector,
            name,
            nodes,
        };
        run(
            injector,
            &[
                "lab",
                "up",
                "--nodes",
                &nodes.to_string(),
                "--name",
                &lab.name,
            ],
        )?;
        Ok(lab)
    }

    pub(crate) fn nodes(&self) -> Result<Vec<Node>> {
        (1..=u8::try_from(self.nodes)?)
            .map(|number| {
                Ok(Node {
                    ns: Netns::named(&format!("injector-{}-n{number}", self.name)),
                    v4: [10, 77, 0, number].into(),
                    v6: [0xfd77, 0, 0, 0, 0, 0, 0, u16::from(number)].into(),
                    mac: [0; 6],
                })
            })
            .collect()
    }

    pub(crate) fn switch(&self) -> Netns {
        Netns::named(&format!("injector-{}-sw", self.name))
    }
}

impl Drop for DemoLab<'_> {
    fn drop(&mut self) {
        for words in [
            &["heal", "--all"][..],
            &["lab", "down", "--name", &self.name],
        ] {
            match injector_apart(self.injector, words) {
                Ok(output) if output.status.success() => {
                    say(Tone::Command, &format!("$ injector {}", words.join(" ")));
                }
                Ok(output) => say(Tone::Bad, &output.describe()),
                Err(error) => say(Tone::Bad, &format!("{error:#}")),
            }
        }
    }
}

//! Services of a lab: started in their nodes, watched, started again, ended.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io,
    path::PathBuf,
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use nix::{sys::signal::Signal, unistd::User};
use tokio::{
    process::Command,
    sync::watch,
    time::{Instant, timeout, timeout_at},
};

use super::{
    World,
    processes::{Found, Process},
};
use crate::scenario::{
    file::{CommandLine, Service},
    record::Event,
};

/// How long `prepare` may take.
const PREPARING: Duration = Duration::from_mins(2);
/// How long a service may take to end after a signal of a step, before it is started again.
const ENDING: Duration = Duration::from_secs(5);
/// How long all of them may take to end after SIGTERM at the end of the run.
const CLOSING: Duration = Duration::from_secs(2);

/// The services of a run.
pub(super) struct Services {
    world: Arc<World>,
    dir: PathBuf,
    running: Mutex<BTreeMap<String, Running>>,
}

struct Running {
    service: Service,
    pid: u32,
    /// A step has sent it a signal, or the run ends: its end is no surprise.
    expected: Arc<Mutex<bool>>,
    /// How it ended, once it has.
    ended: watch::Receiver<Option<String>>,
}

impl Services {
    /// None yet. What they print goes into files of this directory.
    #[must_use]
    pub(super) fn new(world: Arc<World>, dir: PathBuf) -> Self {
        Self {
            world,
            dir,
            running: Mutex::default(),
        }
    }

    /// The file that a service prints into.
    #[must_use]
    pub(super) fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }

    /// Prepares and starts a service.
    pub(super) async fn start(&self, service: &Service) -> Result<(), String> {
        if let Some(prepare) = &service.prepare {
            let failed = |why: &dyn std::fmt::Display| {
                format!(
                    "preparing service {}: {why}; what it printed is in {}",
                    service.name,
                    self.log(&service.name).display()
                )
            };
            let mut command = self.command(service, prepare).map_err(|why| failed(&why))?;
            let mut child = command.spawn().map_err(|error| failed(&error))?;
            let status = timeout(PREPARING, child.wait())
                .await
                .map_err(|_| failed(&format!("not done within {} s", PREPARING.as_secs())))?
                .map_err(|error| failed(&error))?;
            if !status.success() {
                return Err(failed(&status));
            }
        }
        self.launch(service)
    }

    /// Starts a service again that has ended.
    pub(super) async fn restart(&self, name: &str) -> Result<(), String> {
        let (service, mut ended) = {
            let running = self.locked();
            let one = running
                .get(name)
                .ok_or_else(|| format!("service {name} was never started"))?;
            (one.service.clone(), one.ended.clone())
        };
        // After a signal it may take a moment.
        let waited = timeout(ENDING, ended.wait_for(Option::is_some)).await;
        if waited.is_err() {
            return Err(format!(
                "service {name} cannot be started: it is still running"
            ));
        }
        self.launch(&service)
    }

    fn launch(&self, service: &Service) -> Result<(), String> {
        let failed =
            |why: &dyn std::fmt::Display| format!("starting service {}: {why}", service.name);
        let mut command = self
            .command(service, &service.run)
            .map_err(|why| failed(&why))?;
        let mut child = command.spawn().map_err(|error| failed(&error))?;
        let pid = child.id().ok_or_else(|| failed(&"it ended at once"))?;
        let (sender, ended) = watch::channel(None);
        let expected = Arc::new(Mutex::new(false));
        let world = Arc::clone(&self.world);
        let (name, expects) = (service.name.clone(), Arc::clone(&expected));
        world.recorder.write(Event::ServiceStarted {
            service: name.clone(),
            pid,
        });
        tokio::spawn(async move {
            let how = match child.wait().await {
                Ok(status) => status.to_string(),
                Err(error) => error.to_string(),
            };
            let asked = *expects.lock().unwrap_or_else(PoisonError::into_inner);
            world.recorder.write(Event::ServiceEnded {
                service: name,
                how: how.clone(),
                asked,
            });
            sender.send_replace(Some(how));
        });
        self.locked().insert(
            service.name.clone(),
            Running {
                service: service.clone(),
                pid,
                expected,
                ended,
            },
        );
        Ok(())
    }

    /// A command that will run as a service does: in its node, as its user, in a session of its own.
    fn command(&self, service: &Service, line: &CommandLine) -> Result<Command, String> {
        let mut command = self.world.command(line, Some(&service.on))?;
        let log = open_log(&self.log(&service.name))
            .and_then(|log| Ok((log.try_clone()?, log)))
            .map_err(|error| format!("opening {}: {error}", self.log(&service.name).display()))?;
        command
            .envs(&service.env)
            .current_dir(&self.world.scratch)
            .stdin(Stdio::null())
            .stdout(log.0)
            .stderr(log.1);
        let user = service
            .user
            .as_deref()
            .map(|name| {
                User::from_name(name)
                    .map_err(|errno| format!("looking up user {name}: {errno}"))?
                    .ok_or_else(|| format!("there is no user {name} on this host"))
            })
            .transpose()?;
        if let Some(user) = &user {
            command
                .env("HOME", &user.dir)
                .env("USER", &user.name)
                .env("LOGNAME", &user.name);
        }
        let ids = user.map(|user| (user.uid, user.gid));
        // SAFETY: between fork and exec only async-signal-safe system calls are made. This comes after what enters
        // the node's namespaces, which takes privileges.
        unsafe {
            command.pre_exec(move || {
                nix::unistd::setsid()?;
                if let Some((uid, gid)) = ids {
                    nix::unistd::setgroups(&[gid])?;
                    nix::unistd::setgid(gid)?;
                    nix::unistd::setuid(uid)?;
                }
                Ok(())
            });
        }
        Ok(command)
    }

    /// The main process of a service that is running.
    #[must_use]
    pub(super) fn pid(&self, name: &str) -> Option<u32> {
        let running = self.locked();
        let one = running.get(name)?;
        one.ended.borrow().is_none().then_some(one.pid)
    }

    /// How a service ended, if it has.
    #[must_use]
    pub(super) fn ended(&self, name: &str) -> Option<String> {
        let running = self.locked();
        running.get(name).and_then(|one| one.ended.borrow().clone())
    }

    /// A step is about to send a signal to these processes: services among them may end.
    pub(super) fn expect_ends(&self, found: &Found) {
        for one in self.locked().values() {
            if found.has(one.pid) {
                *one.expected.lock().unwrap_or_else(PoisonError::into_inner) = true;
            }
        }
    }

    /// The services that run in a node.
    #[must_use]
    pub(super) fn of_node(&self, node: &str) -> Vec<u32> {
        self.locked()
            .values()
            .filter(|one| one.service.on == node && one.ended.borrow().is_none())
            .map(|one| one.pid)
            .collect()
    }

    /// The run is about to end a service.
    fn expect_end(&self, name: &str) {
        if let Some(one) = self.locked().get(name) {
            *one.expected.lock().unwrap_or_else(PoisonError::into_inner) = true;
        }
    }

    /// Ends all services. Those that do not end in time are left to the keeper.
    pub(super) async fn stop_all(&self) {
        let all: Vec<(String, u32, watch::Receiver<Option<String>>)> = self
            .locked()
            .iter()
            .map(|(name, one)| (name.clone(), one.pid, one.ended.clone()))
            .collect();
        for (name, pid, ended) in &all {
            self.expect_end(name);
            if ended.borrow().is_none()
                && let Some(process) = Process::of(*pid)
            {
                // One that has ended in this moment needs no signal.
                let _ = process.signal(Signal::SIGTERM);
            }
        }
        let deadline = Instant::now() + CLOSING;
        for (_, _, mut ended) in all {
            // Those that take longer are killed: their data goes with the lab.
            let _ = timeout_at(deadline, ended.wait_for(Option::is_some)).await;
        }
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn open_log(path: &std::path::Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

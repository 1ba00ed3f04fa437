//! What was changed on the host, written down before it is changed, so that whoever comes after a
//! crash can undo exactly that and nothing else.
//!
//! One JSON object a line: `{"id":1,"entry":{…}}` before a change, `{"done":1}` after it was undone.
//! Every line is on disk before [`Journal::record`] returns; a last line without its newline was never
//! acted on.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};

use crate::{
    netlink::Hook,
    netns::{Netns, NetnsId},
    undo::{self, Outcome},
};

/// Name of the journal in the state directory.
pub const FILE_NAME: &str = "journal.jsonl";
/// Where lines go that cannot be read, so that nothing is lost with them.
const UNREADABLE: &str = "journal.unreadable";
/// Struck-out lines that may gather before the file is written anew.
const SLACK: usize = 1024;

/// One change to one interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Boot in which it was made ([`boot_id`]).
    pub boot_id: String,
    /// Process that made it.
    pub pid: u32,
    /// Namespace, by identity.
    pub netns: NetnsId,
    /// Where the namespace could be opened then.
    pub netns_path: PathBuf,
    /// Interface index.
    pub ifindex: u32,
    /// Interface name.
    pub ifname: String,
    /// Hardware address, in hexadecimal: another interface that was given the index and the name is
    /// told by it.
    pub mac: String,
    /// What was changed.
    pub change: Change,
}

/// A kind of change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum Change {
    /// A clsact qdisc was added.
    Clsact,
    /// The devices of a lane were made: the entry's interface is its carrier.
    Lane,
    /// A filter was attached.
    Filter {
        /// Where.
        hook: Hook,
        /// Preference.
        priority: u16,
        /// Handle.
        handle: u32,
        /// Name.
        name: String,
        /// Id of the program, which makes the filter unmistakable.
        program: u32,
    },
}

/// Number of an entry in its journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct EntryId(pub u64);

/// A line of the file.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Made { id: EntryId, entry: Entry },
    Done { done: EntryId },
}

/// The journal of one state directory. Its user holds the lock of that directory.
#[derive(Debug)]
pub struct Journal {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    file: File,
    length: u64,
    lines: usize,
    next: u64,
    pending: BTreeMap<EntryId, Entry>,
}

/// Why the journal failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// It could not be read.
    #[error("cannot read the journal {path}: {source}; check the state directory's owner and mode")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It could not be written.
    #[error(
        "cannot write the journal {path}: {source}; nothing is changed on the host that cannot be \
         written down first: make room in, or name another, state directory"
    )]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel would not say which boot this is.
    #[error("cannot read the boot id: {0}; is /proc mounted?")]
    BootId(io::Error),
}

/// What [`recover`] did. Each text is a full sentence for the log.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
pub struct Recovery {
    /// Undone now.
    pub undone: Vec<String>,
    /// Nothing to undo any more: namespace, interface or filter has gone, others have come to depend on
    /// it, or the host has rebooted.
    pub gone: Vec<String>,
    /// Could not be undone; still in the journal.
    pub failed: Vec<String>,
}

impl Recovery {
    /// Whether there was nothing to recover from.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.undone.is_empty() && self.gone.is_empty() && self.failed.is_empty()
    }
}

/// Which boot of the machine this is.
pub fn boot_id() -> Result<String, JournalError> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim().to_owned())
        .map_err(JournalError::BootId)
}

/// What a journal file says.
#[derive(Default)]
struct Contents {
    pending: BTreeMap<EntryId, Entry>,
    /// The highest number that was ever given.
    last: u64,
    unreadable: Vec<String>,
}

impl Contents {
    fn load(path: &Path) -> Result<Option<Self>, JournalError> {
        let mut bytes = Vec::new();
        match File::open(path).and_then(|mut file| file.read_to_end(&mut bytes)) {
            Ok(_) => Ok(Some(Self::parse(&bytes))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(JournalError::Read {
                path: path.to_owned(),
                source,
            }),
        }
    }

    fn parse(bytes: &[u8]) -> Self {
        let mut contents = Self::default();
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            let Some(line) = line.strip_suffix(b"\n") else {
                break;
            };
            match serde_json::from_slice(line) {
                Ok(Line::Made { id, entry }) => {
                    contents.last = contents.last.max(id.0);
                    contents.pending.insert(id, entry);
                }
                Ok(Line::Done { done }) => {
                    contents.last = contents.last.max(done.0);
                    contents.pending.remove(&done);
                }
                Err(_) if line.iter().all(u8::is_ascii_whitespace) => {}
                Err(_) => contents
                    .unreadable
                    .push(String::from_utf8_lossy(line).into_owned()),
            }
        }
        contents
    }

    /// Writes the journal anew with what is pending, atomically.
    fn save(&self, dir: &Path) -> Result<(File, u64), JournalError> {
        let path = dir.join(FILE_NAME);
        let fresh = dir.join(format!("{FILE_NAME}.new"));
        let write = || -> io::Result<(File, u64)> {
            if !self.unreadable.is_empty() {
                let mut aside = OpenOptions::new()
                    .create(true)
                    .append(true)
                    .mode(0o600)
                    .open(dir.join(UNREADABLE))?;
                aside.write_all((self.unreadable.join("\n") + "\n").as_bytes())?;
                aside.sync_all()?;
            }
            let mut text = Vec::new();
            for (id, entry) in &self.pending {
                text.extend(line(&Line::Made {
                    id: *id,
                    entry: entry.clone(),
                })?);
            }
            // A leftover of a crash during an earlier rewrite is of no value.
            match fs::remove_file(&fresh) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = OpenOptions::new()
                .create_new(true)
                .append(true)
                .mode(0o600)
                .open(&fresh)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&fresh, &path)?;
            File::open(dir)?.sync_all()?;
            Ok((file, text.len() as u64))
        };
        write().map_err(|source| JournalError::Write {
            path: path.clone(),
            source,
        })
    }
}

fn line(line: &Line) -> io::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(line)?;
    bytes.push(b'\n');
    Ok(bytes)
}

impl Journal {
    /// Opens (or makes) the journal in `dir`. What it still holds from before stays in it: see
    /// [`recover`].
    pub fn open(dir: &Path) -> Result<Journal, JournalError> {
        let contents = Contents::load(&dir.join(FILE_NAME))?.unwrap_or_default();
        let (file, length) = contents.save(dir)?;
        Ok(Journal {
            inner: Mutex::new(Inner {
                dir: dir.to_owned(),
                file,
                length,
                lines: contents.pending.len(),
                next: contents.last + 1,
                pending: contents.pending,
            }),
        })
    }

    /// Writes an entry down; returns when it is on disk.
    pub fn record(&self, entry: &Entry) -> Result<EntryId, JournalError> {
        let mut inner = self.lock();
        let id = EntryId(inner.next);
        inner.append(&Line::Made {
            id,
            entry: entry.clone(),
        })?;
        inner.next += 1;
        inner.pending.insert(id, entry.clone());
        Ok(id)
    }

    /// Strikes an entry out: it was undone.
    pub fn done(&self, id: EntryId) -> Result<(), JournalError> {
        let mut inner = self.lock();
        if !inner.pending.contains_key(&id) {
            return Ok(());
        }
        inner.append(&Line::Done { done: id })?;
        inner.pending.remove(&id);
        if inner.lines > inner.pending.len() + SLACK || inner.pending.is_empty() {
            inner.compact()?;
        }
        Ok(())
    }

    /// Entries that are not struck out.
    #[must_use]
    pub fn pending(&self) -> Vec<(EntryId, Entry)> {
        self.lock()
            .pending
            .iter()
            .map(|(id, entry)| (*id, entry.clone()))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // What is in memory changes only after the file did: a panic in between loses nothing.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn append(&mut self, entry: &Line) -> Result<(), JournalError> {
        let written = line(entry).and_then(|bytes| {
            self.file.write_all(&bytes)?;
            self.file.sync_data()?;
            Ok(bytes.len() as u64)
        });
        match written {
            Ok(length) => {
                self.length += length;
                self.lines += 1;
                Ok(())
            }
            Err(source) => {
                // Half a line would swallow the next one.
                let _ = self.file.set_len(self.length);
                Err(JournalError::Write {
                    path: self.dir.join(FILE_NAME),
                    source,
                })
            }
        }
    }

    fn compact(&mut self) -> Result<(), JournalError> {
        let contents = Contents {
            pending: self.pending.clone(),
            ..Contents::default()
        };
        let (file, length) = contents.save(&self.dir)?;
        self.file = file;
        self.length = length;
        self.lines = self.pending.len();
        Ok(())
    }
}

/// Whether the journal in `dir` has entries that are not struck out (no journal: none).
pub fn has_leftovers(dir: &Path) -> Result<bool, JournalError> {
    Ok(Contents::load(&dir.join(FILE_NAME))?.is_some_and(|contents| !contents.pending.is_empty()))
}

/// Undoes what a dead daemon left behind, newest first. The caller holds the lock of the directory and
/// has not opened the journal yet: it is written anew.
/// What could not be undone stays in the journal and is tried again the next time.
pub fn recover(dir: &Path) -> Result<Recovery, JournalError> {
    let path = dir.join(FILE_NAME);
    let Some(mut contents) = Contents::load(&path)? else {
        return Ok(Recovery::default());
    };
    let boot = boot_id()?;
    let mut recovery = Recovery::default();
    for text in &contents.unreadable {
        recovery.failed.push(format!(
            "A line of the journal {} cannot be read and was moved to {}: {text}",
            path.display(),
            dir.join(UNREADABLE).display()
        ));
    }
    let mut by_interface: BTreeMap<(NetnsId, u32), Vec<(EntryId, Entry)>> = BTreeMap::new();
    for (id, entry) in std::mem::take(&mut contents.pending) {
        if entry.boot_id == boot {
            by_interface
                .entry((entry.netns, entry.ifindex))
                .or_default()
                .push((id, entry));
        } else {
            recovery.gone.push(format!(
                "{} has gone with the boot in which it was made.",
                undo::describe(&entry)
            ));
        }
    }
    let mut kept = BTreeSet::new();
    for ((id, _), mut entries) in by_interface {
        entries.reverse();
        let Some((_, first)) = entries.first() else {
            continue;
        };
        let netns = Netns::recorded(id, &first.netns_path);
        let list: Vec<&Entry> = entries.iter().map(|(_, entry)| entry).collect();
        let (outcomes, error) = undo::undo(&netns, &list);
        let done = outcomes.len();
        for outcome in outcomes {
            match outcome {
                Outcome::Undone(text) => recovery.undone.push(text),
                Outcome::Gone(text) | Outcome::Kept(text) => recovery.gone.push(text),
            }
        }
        if let Some(error) = error {
            for (id, entry) in entries.into_iter().skip(done) {
                recovery.failed.push(format!(
                    "{} could not be taken back: {error}.",
                    undo::describe(&entry)
                ));
                kept.insert(id);
                contents.pending.insert(id, entry);
            }
        }
    }
    contents.save(dir)?;
    Ok(recovery)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(ifindex: u32, change: Change) -> Entry {
        Entry {
            boot_id: "another boot".to_owned(),
            pid: 1,
            netns: NetnsId {
                dev: 4,
                ino: 5,
                cookie: 6,
            },
            netns_path: "/run/netns/x".into(),
            ifindex,
            ifname: "eth0".to_owned(),
            mac: String::new(),
            change,
        }
    }

    fn text(dir: &Path) -> String {
        fs::read_to_string(dir.join(FILE_NAME)).unwrap()
    }

    #[test]
    fn entries_survive_until_they_are_struck_out() {
        let dir = tempfile::tempdir().unwrap();
        let filter = Change::Filter {
            hook: Hook::Egress,
            priority: 1,
            handle: 1,
            name: "injector:egress".to_owned(),
            program: 9,
        };
        let (first, second) = {
            let journal = Journal::open(dir.path()).unwrap();
            let first = journal.record(&entry(1, Change::Clsact)).unwrap();
            let second = journal.record(&entry(1, filter.clone())).unwrap();
            (first, second)
        };
        assert!(has_leftovers(dir.path()).unwrap());
        let journal = Journal::open(dir.path()).unwrap();
        assert_eq!(
            journal.pending(),
            [
                (first, entry(1, Change::Clsact)),
                (second, entry(1, filter))
            ]
        );
        journal.done(second).unwrap();
        journal.done(second).unwrap();
        let third = journal.record(&entry(2, Change::Clsact)).unwrap();
        assert!(third > second, "numbers are not used twice");
        journal.done(first).unwrap();
        journal.done(third).unwrap();
        assert!(!has_leftovers(dir.path()).unwrap());
        assert_eq!(text(dir.path()), "", "an empty journal takes no room");
    }

    #[test]
    fn a_torn_last_line_was_never_acted_on() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        journal.record(&entry(1, Change::Clsact)).unwrap();
        let whole = text(dir.path());
        for cut in 1..=whole.len() {
            fs::write(
                dir.path().join(FILE_NAME),
                format!("{whole}{}", &whole[..whole.len() - cut]),
            )
            .unwrap();
            let pending = Journal::open(dir.path()).unwrap().pending();
            assert_eq!(pending.len(), 1);
        }
        assert!(!dir.path().join(UNREADABLE).exists());
    }

    #[test]
    fn unreadable_lines_are_reported_and_kept_aside() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE_NAME), "{\"id\":\n\nnonsense\n").unwrap();
        let recovery = recover(dir.path()).unwrap();
        assert_eq!(recovery.failed.len(), 2, "{recovery:?}");
        let aside = fs::read_to_string(dir.path().join(UNREADABLE)).unwrap();
        assert_eq!(aside, "{\"id\":\nnonsense\n");
        assert!(recover(dir.path()).unwrap().is_empty());
    }

    #[test]
    fn what_another_boot_left_has_gone_with_it() {
        let dir = tempfile::tempdir().unwrap();
        assert!(recover(dir.path()).unwrap().is_empty());
        assert!(
            !dir.path().join(FILE_NAME).exists(),
            "looking leaves nothing"
        );
        Journal::open(dir.path())
            .unwrap()
            .record(&entry(1, Change::Clsact))
            .unwrap();
        let recovery = recover(dir.path()).unwrap();
        assert_eq!(recovery.gone.len(), 1);
        assert!(recovery.undone.is_empty() && recovery.failed.is_empty());
        assert!(!has_leftovers(dir.path()).unwrap());
    }

    #[test]
    fn a_namespace_that_is_nowhere_has_gone() {
        let dir = tempfile::tempdir().unwrap();
        let mut of_this_boot = entry(1, Change::Clsact);
        of_this_boot.boot_id = boot_id().unwrap();
        Journal::open(dir.path())
            .unwrap()
            .record(&of_this_boot)
            .unwrap();
        let recovery = recover(dir.path()).unwrap();
        assert_eq!(recovery.gone.len(), 1, "{recovery:?}");
        assert!(recovery.gone[0].contains("eth0"), "{recovery:?}");
    }

    #[test]
    fn the_file_does_not_grow_without_bound() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        journal.record(&entry(1, Change::Clsact)).unwrap();
        for _ in 0..2 * SLACK {
            let id = journal.record(&entry(2, Change::Clsact)).unwrap();
            journal.done(id).unwrap();
        }
        assert!(text(dir.path()).lines().count() <= SLACK + 2);
        assert_eq!(Journal::open(dir.path()).unwrap().pending().len(), 1);
    }
}

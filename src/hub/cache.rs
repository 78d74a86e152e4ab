//! The cache on disk, as Python's `huggingface_hub` keeps it:
//!
//! ```text
//! models--ORG--NAME/
//!   blobs/ETAG                 the bytes, under the hub's name for them; ETAG.incomplete while they come
//!   refs/main                  the commit that a branch was at when it was last asked for
//!   snapshots/COMMIT/FILE      links to blobs
//! .locks/models--ORG--NAME/    held while a blob is fetched
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Component, Path, PathBuf};

use ring::digest::{Context, SHA256};
use ureq::http::StatusCode;

use super::http::{Remote, TRIES, disconnected};
use super::{Cause, Hub, HubError, Repo};
use crate::bytes;
use crate::files;
use crate::progress::{Bar, Console};

/// Bytes that have to come for a connection that breaks off not to count as one that brings nothing.
const PROGRESS: u64 = 1 << 20;
const PIECE: usize = 256 << 10;

/// Whether a word from the hub may become a file's name.
pub(super) fn is_plain(word: &str) -> bool {
    (1..=128).contains(&word.len()) && word.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
}

/// Whether a name from the hub stays in its folder, on any system.
fn is_inside(name: &str) -> bool {
    !(name.is_empty() || name.contains(['\\', ':']))
        && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

/// A repository at a commit: the files it holds, and those of them that are on disk.
#[derive(Debug, Clone)]
pub struct Snapshot {
    hub: Hub,
    repo: Repo,
    /// The repository's folder in the cache.
    place: PathBuf,
    commit: String,
    files: Vec<String>,
    /// The hub was not asked: only what is on disk can be had.
    kept: bool,
}

impl Snapshot {
    /// What the hub told, and remembers it.
    pub(super) fn new(
        hub: &Hub,
        repo: Repo,
        place: PathBuf,
        commit: String,
        files: Vec<String>,
    ) -> Result<Self, HubError> {
        let files = files.into_iter().filter(|name| is_inside(name)).collect();
        let reference = place.join("refs").join(&repo.revision);
        if repo.revision != commit && fs::read_to_string(&reference).ok().as_deref() != Some(&commit) {
            make_parent(&reference)?;
            files::write(&reference, commit.as_bytes()).map_err(|e| HubError::disk(&reference, &e.source))?;
        }
        Ok(Self { hub: hub.clone(), repo, place, commit, files, kept: false })
    }

    /// What the cache has, if it has anything.
    pub(super) fn kept(hub: &Hub, repo: &Repo, place: PathBuf) -> Option<Self> {
        let named = fs::read_to_string(place.join("refs").join(&repo.revision)).ok();
        let commit = named.map_or_else(|| repo.revision.clone(), |commit| commit.trim().to_owned());
        let folder = place.join("snapshots").join(&commit);
        if !is_plain(&commit) || !folder.is_dir() {
            return None;
        }
        let mut files = Vec::new();
        list(&folder, "", &mut files);
        files.sort_unstable();
        Some(Self { hub: hub.clone(), repo: repo.clone(), place, commit, files, kept: true })
    }

    /// The commit that it is.
    #[must_use]
    pub fn commit(&self) -> &str {
        &self.commit
    }

    /// The repository as a person writes it.
    #[must_use]
    pub fn shown(&self) -> String {
        self.repo.shown()
    }

    /// Names of its files, with `/` between folders. Without the hub, of those on disk.
    #[must_use]
    pub fn files(&self) -> &[String] {
        &self.files
    }

    /// Whether it holds a file.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.files.iter().any(|file| file == name)
    }

    /// Whether the hub was not asked, so that it may hold more than what is on disk.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.kept
    }

    /// An error about what it holds.
    #[must_use]
    pub fn refuse(&self, problem: String, help: String) -> HubError {
        let partly = "only the cache was looked at, and it may have a part of it; with a network there may be more. ";
        HubError::request(self.shown(), problem, if self.kept { format!("{partly}{help}") } else { help })
    }

    /// Fetches the files of these names that are not on disk yet. The folder that they are in.
    ///
    /// # Errors
    /// A file is not there or may not be read, its bytes are not those that the hub promised, or the connection or the
    /// disk failed. What came of it is kept and fetched on by the next try.
    pub fn fetch(&self, names: &[impl AsRef<str>], console: &Console) -> Result<PathBuf, HubError> {
        let folder = self.place.join("snapshots").join(&self.commit);
        let missing: Vec<&str> = names.iter().map(AsRef::as_ref).filter(|name| !folder.join(name).exists()).collect();
        if missing.is_empty() {
            return Ok(folder);
        }
        if self.kept {
            let problem = format!("files of it were never fetched: {}", missing.join(", "));
            let help = format!(
                "the cache {} has only a part of it; run again with a network and without HF_HUB_OFFLINE",
                self.hub.cache.display()
            );
            return Err(HubError::request(self.shown(), problem, help));
        }
        if let Some(name) = missing.iter().find(|name| !is_inside(name)) {
            return Err(HubError::request(
                self.shown(),
                format!("`{name}` is no name of a file in it"),
                "mend the name",
            ));
        }
        let remotes = missing.iter().map(|name| self.hub.client.head(&self.repo, &self.commit, name, console));
        let remotes = remotes.collect::<Result<Vec<_>, _>>()?;
        let total: u64 = remotes.iter().map(|remote| remote.size).sum();
        let count = if missing.len() == 1 { missing[0].to_owned() } else { format!("{} files", missing.len()) };
        let size = bytes::shown(usize::try_from(total).unwrap_or(usize::MAX));
        console.fact("hub", format_args!("{}: {count}, {size}, into {}", self.shown(), self.place.display()));
        let bar = console.bytes_bar("fetching", total);
        for (name, remote) in missing.iter().zip(&remotes) {
            let blob = self.place.join("blobs").join(&remote.etag);
            make_parent(&blob)?;
            self.fetch_blob(name, remote, &blob, &bar, console)?;
            link(&blob, &folder.join(name), name.split('/').count())?;
        }
        Ok(folder)
    }

    fn fetch_blob(
        &self,
        name: &str,
        remote: &Remote,
        blob: &Path,
        bar: &Bar<'_>,
        console: &Console,
    ) -> Result<(), HubError> {
        let lock = self.hub.cache.join(".locks").join(self.repo.folder()).join(format!("{}.lock", remote.etag));
        make_parent(&lock)?;
        // another process may be at the same file; where locks are not to be had, as on some network disks, two of them
        // would write into one, and its hash would tell
        let held = File::create(&lock).map_err(|e| HubError::disk(&lock, &e))?;
        if matches!(held.try_lock(), Err(fs::TryLockError::WouldBlock)) {
            console.line(format_args!("waiting for another process that fetches {name}"));
            let _ = held.lock();
        }
        if blob.exists() {
            bar.advance(remote.size);
            return Ok(());
        }
        let partial = blob.with_file_name(format!("{}.incomplete", remote.etag));
        let hash = self.transfer(name, remote, &partial, bar, console)?;
        if let Some(expected) = remote.sha256()
            && !expected.eq_ignore_ascii_case(&hash)
        {
            let _ = fs::remove_file(&partial);
            let problem = format!("has the SHA-256 {hash}, and the hub promised {expected}");
            let help = "the transfer was broken, and what came is removed; run again to fetch the file anew";
            return Err(HubError::new(Cause::Failure, &remote.url, problem, help));
        }
        fs::rename(&partial, blob).map_err(|e| HubError::disk(blob, &e))
    }

    /// Brings all bytes of a file, after those of an earlier try, and gives their SHA-256.
    fn transfer(
        &self,
        name: &str,
        remote: &Remote,
        partial: &Path,
        bar: &Bar<'_>,
        console: &Console,
    ) -> Result<String, HubError> {
        let disk = |e: io::Error| HubError::disk(partial, &e);
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(partial).map_err(disk)?;
        let mut hash = Context::new(&SHA256);
        let mut buffer = vec![0; PIECE];
        let mut have = 0;
        loop {
            let read = file.read(&mut buffer).map_err(disk)?;
            if read == 0 {
                break;
            }
            hash.update(&buffer[..read]);
            have += read as u64;
        }
        let begin_again = |file: &mut File, hash: &mut Context, have: &mut u64| {
            (*hash, *have) = (Context::new(&SHA256), 0);
            file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0))).map_err(disk)
        };
        if have > remote.size {
            begin_again(&mut file, &mut hash, &mut have)?;
        }
        bar.advance(have);
        let mut fruitless = 0;
        while have < remote.size {
            let response = self.hub.client.get(remote, have, &self.repo, name, console)?;
            let whole = response.status() == StatusCode::OK;
            let goes_on = !whole && have > 0 && continues(&response, have);
            if have > 0 && !goes_on {
                // a server without ranges sends the file from its beginning, or says that there is no such part
                begin_again(&mut file, &mut hash, &mut have)?;
            }
            let before = have;
            let mut body = response.into_body().into_reader();
            let broken = loop {
                if !(whole || goes_on) {
                    break Some(io::Error::other("the server sends another part of the file"));
                }
                match body.read(&mut buffer) {
                    Ok(0) => break None,
                    Ok(read) if have + read as u64 > remote.size => {
                        break Some(io::Error::other("too many bytes come"));
                    }
                    Ok(read) => {
                        file.write_all(&buffer[..read]).map_err(|e| {
                            let mut error = disk(e);
                            error.problem += &format!(" (after {have} of the {} bytes of {name})", remote.size);
                            error
                        })?;
                        hash.update(&buffer[..read]);
                        have += read as u64;
                        bar.advance(read as u64);
                    }
                    Err(error) => break Some(error),
                }
            };
            if have < remote.size {
                fruitless = if have - before >= PROGRESS { 0 } else { fruitless + 1 };
                if fruitless >= TRIES {
                    let error = broken.unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into());
                    let mut error = disconnected(&remote.url, &error.into());
                    error.problem = format!("broke off after {have} of {} bytes", remote.size);
                    error.help = Some("what came is kept: run again to fetch the rest".into());
                    return Err(error);
                }
                console.warning(format_args!("{name}: broke off after {have} of {} bytes; going on", remote.size));
            }
        }
        file.sync_all().map_err(disk)?;
        Ok(hash.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// Whether an answer holds the bytes from `start` on.
fn continues(response: &ureq::http::Response<ureq::Body>, start: u64) -> bool {
    let range = response.headers().get("content-range").and_then(|range| range.to_str().ok());
    response.status() == StatusCode::PARTIAL_CONTENT
        && range.is_some_and(|range| range.starts_with(&format!("bytes {start}-")))
}

fn make_parent(path: &Path) -> Result<(), HubError> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).map_err(|e| HubError::disk(parent, &e))
}

/// Puts a blob into a snapshot, `depth` names below its folder: as a link, or itself where the system has no links.
fn link(blob: &Path, pointer: &Path, depth: usize) -> Result<(), HubError> {
    make_parent(pointer)?;
    if pointer.is_symlink() {
        // of a blob that somebody deleted
        fs::remove_file(pointer).map_err(|e| HubError::disk(pointer, &e))?;
    }
    let target: PathBuf = std::iter::repeat_n("..", depth + 1).collect();
    let target = target.join("blobs").join(blob.file_name().unwrap_or_default());
    #[cfg(unix)]
    let linked = std::os::unix::fs::symlink(target, pointer);
    #[cfg(windows)]
    let linked = std::os::windows::fs::symlink_file(target, pointer);
    match linked {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => fs::rename(blob, pointer),
        _ => Ok(()),
    }
    .map_err(|e| HubError::disk(pointer, &e))
}

/// The files below a folder, with `/` between names.
fn list(folder: &Path, prefix: &str, files: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        let path = entry.path();
        if path.is_dir() {
            list(&path, &format!("{name}/"), files);
        } else if path.exists() {
            files.push(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["config.json", "data/train-00000-of-00001.parquet", "a..b"] {
            assert!(is_inside(name), "{name}");
        }
        for name in ["", "/etc/x", "../x", "a/../../x", "C:x", "a\\b"] {
            assert!(!is_inside(name), "{name}");
        }
        for word in ["", "../x", "a/b", ".", "a.lock"] {
            assert!(!is_plain(word), "{word}");
        }
    }
}

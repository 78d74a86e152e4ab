//! Writing that leaves either the old file or the new one, and never a half: under a temporary name, synced, renamed.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use miette::Diagnostic;
use thiserror::Error;

use crate::bytes;
use crate::tensor_file::describe_io;

/// A file or folder that could not be written.
#[derive(Debug, Error, Diagnostic)]
#[error("cannot write {}: {}", path.display(), describe_io(source))]
pub struct WriteError {
    /// What was to be written.
    pub path: PathBuf,
    /// Why not.
    pub source: io::Error,
}

/// The error of writing `path`.
pub(crate) fn cannot_write(path: &Path) -> impl Fn(io::Error) -> WriteError {
    let path = path.to_owned();
    move |source| WriteError { path: path.clone(), source }
}

/// Ends the names of what is being written; a leftover of a killed run may be deleted.
const TEMPORARY: &str = ".partial";

fn temporary(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!("-{}{TEMPORARY}", std::process::id()));
    path.with_file_name(name)
}

/// Stands before [`TEMPORARY`] where a folder that is replaced steps aside.
const ASIDE: &str = ".old";

fn aside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!("-{}{ASIDE}{TEMPORARY}", std::process::id()));
    path.with_file_name(name)
}

/// Removes what processes that are no more have left of writing `path`.
fn remove_leftovers(path: &Path) {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return };
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    remove_abandoned(folder, |of, id| of == name && !is_alive(id));
}

/// Removes what processes that are no more have left half-written in a folder, for one that has not begun to write there.
/// What another one is writing stays.
pub fn remove_partials(folder: &Path) {
    // in a container the process that went on before had this one's number
    remove_abandoned(folder, |_, id| id.unsigned_abs() == std::process::id() || !is_alive(id));
}

/// Removes what is half-written under a name and by a process that `is_abandoned` says it of. What stepped aside and was not
/// replaced is whole, and takes its name again.
fn remove_abandoned(folder: &Path, is_abandoned: impl Fn(&str, i32) -> bool) {
    for path in fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()) {
        let Some(name) =
            path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(TEMPORARY))
        else {
            continue;
        };
        let Some((of, id)) = name.strip_suffix(ASIDE).unwrap_or(name).rsplit_once('-') else { continue };
        if !id.parse().is_ok_and(|id| id > 0 && is_abandoned(of, id)) {
            continue;
        }
        let replaced = folder.join(of);
        let _ = match path.is_dir() {
            true if name.ends_with(ASIDE) && !replaced.exists() => fs::rename(&path, &replaced),
            true => fs::remove_dir_all(&path),
            false => fs::remove_file(&path),
        };
    }
}

/// Whether there is a process of that number; where the system does not tell, there may be.
fn is_alive(id: i32) -> bool {
    #[cfg(unix)]
    {
        rustix::process::Pid::from_raw(id).is_none_or(|id| {
            // one of another user is there too
            !matches!(rustix::process::test_kill_process(id), Err(rustix::io::Errno::SRCH))
        })
    }
    #[cfg(not(unix))]
    {
        let _ = id;
        true
    }
}

/// Writes a whole file.
///
/// # Errors
/// The system's, with the path; the temporary file is removed.
pub fn write(path: &Path, contents: &[u8]) -> Result<(), WriteError> {
    write_with(path, |file| file.write_all(contents).map_err(cannot_write(path)))
}

/// Makes a file out of what `fill` writes, all of it or none. An existing file of that name is replaced.
///
/// # Errors
/// The system's, with the path, or `fill`'s; the temporary file is removed.
pub fn write_with<E: From<WriteError>>(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> Result<(), E>,
) -> Result<(), E> {
    write_at(path, |partial| {
        let mut file = BufWriter::new(File::create(partial).map_err(cannot_write(path))?);
        fill(&mut file)?;
        Ok(file.flush().map_err(cannot_write(path))?)
    })
}

/// Makes a file out of the one that `fill` makes under the name it is given, all of it or none.
///
/// # Errors
/// The system's, with the path, or `fill`'s; the temporary file is removed.
pub fn write_at<E: From<WriteError>>(path: &Path, fill: impl FnOnce(&Path) -> Result<(), E>) -> Result<(), E> {
    remove_leftovers(path);
    let partial = temporary(path);
    let made = (|| {
        fill(&partial)?;
        let sync = || File::open(&partial)?.sync_all();
        sync().map_err(cannot_write(path))?;
        fs::rename(&partial, path).map_err(cannot_write(path))?;
        sync_parent(path);
        Ok(())
    })();
    if made.is_err() {
        let _ = fs::remove_file(&partial);
    }
    made
}

/// Makes a folder out of what `fill` writes into it, all of it or none. An existing folder of that name is replaced.
///
/// # Errors
/// The system's, with the path, or `fill`'s; what was written is removed.
pub fn write_folder<E: From<WriteError>>(path: &Path, fill: impl FnOnce(&Path) -> Result<(), E>) -> Result<(), E> {
    remove_leftovers(path);
    let partial = temporary(path);
    let replaced = aside(path);
    let made = (|| {
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(cannot_write(&partial))?;
        }
        fs::create_dir_all(&partial).map_err(cannot_write(path))?;
        fill(&partial)?;
        sync_folder(&partial).map_err(cannot_write(path))?;
        if !path.exists() {
            fs::rename(&partial, path).map_err(cannot_write(path))?;
        } else if exchange(&partial, path) {
            let _ = fs::remove_dir_all(&partial);
        } else {
            // a folder cannot be renamed onto a full one: the old one steps aside first
            let _ = fs::remove_dir_all(&replaced);
            fs::rename(path, &replaced).map_err(cannot_write(path))?;
            fs::rename(&partial, path).map_err(cannot_write(path))?;
            let _ = fs::remove_dir_all(&replaced);
        }
        sync_parent(path);
        Ok(())
    })();
    if made.is_err() {
        let _ = fs::remove_dir_all(&partial);
    }
    made
}

/// Gives two folders each other's name at once, where the system can: at no moment is there none.
fn exchange(one: &Path, two: &Path) -> bool {
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        renameat_with(CWD, one, CWD, two, RenameFlags::EXCHANGE).is_ok()
    }
    #[cfg(not(any(target_os = "linux", target_os = "macos")))]
    {
        let _ = (one, two);
        false
    }
}

/// What is to be written takes more than the disk has.
#[derive(Debug, Error, Diagnostic)]
#[error("{} takes {}, and there are {} free where it is to be", path.display(), bytes::shown(*needed), bytes::shown(*free))]
#[diagnostic(help("make room, or name another place with --out"))]
pub struct NoSpace {
    /// What was to be written.
    pub path: PathBuf,
    /// Bytes that it takes.
    pub needed: usize,
    /// Bytes that there are.
    pub free: usize,
}

/// Checks that `needed` bytes can be written as `path`, where the system tells.
///
/// # Errors
/// They cannot.
pub fn check_space(path: &Path, needed: usize) -> Result<(), NoSpace> {
    // it may be several folders that are not there yet
    let there =
        std::path::absolute(path).ok().and_then(|path| path.ancestors().find(|p| p.exists()).map(Path::to_owned));
    match there.and_then(|there| free_space(&there)) {
        Some(free) if free < needed => Err(NoSpace { path: path.to_owned(), needed, free }),
        _ => Ok(()),
    }
}

/// Bytes that can be written into a folder.
fn free_space(folder: &Path) -> Option<usize> {
    #[cfg(unix)]
    {
        let stat = rustix::fs::statvfs(folder).ok()?;
        usize::try_from(stat.f_bavail.saturating_mul(stat.f_frsize)).ok()
    }
    #[cfg(not(unix))]
    {
        let _ = folder;
        None
    }
}

/// Syncs the files of a folder and the folder itself.
fn sync_folder(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_file() {
            File::open(&path)?.sync_all()?;
        }
    }
    sync_directory(folder);
    Ok(())
}

fn sync_parent(path: &Path) {
    if let Some(parent) = path.parent() {
        sync_directory(parent);
    }
}

/// Makes a rename durable. Not every system can open a directory; where it cannot, the rename is still atomic.
fn sync_directory(directory: &Path) {
    if let Ok(directory) = File::open(directory) {
        let _ = directory.sync_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_folder_leaves_the_old_one_and_nothing_else() {
        let place = tempfile::tempdir().expect("a folder");
        let target = place.path().join("checkpoint");
        let put = |text: &'static str| move |folder: &Path| write(&folder.join("state"), text.as_bytes());
        write_folder(&target, put("first")).expect("written");
        write_folder(&target, put("second")).expect("replaced");
        let failed = write_folder(&target, |folder| {
            write(&folder.join("state"), b"third")?;
            Err(WriteError { path: folder.to_owned(), source: io::Error::other("no") })
        });
        assert!(failed.is_err());
        assert_eq!(fs::read_to_string(target.join("state")).expect("there"), "second");
        assert_eq!(fs::read_dir(place.path()).expect("there").count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn only_what_the_dead_were_writing_is_removed() {
        let place = tempfile::tempdir().expect("a folder");
        let mut child = std::process::Command::new("true").spawn().expect("started");
        let dead = child.id();
        child.wait().expect("ended");
        let mut other = std::process::Command::new("sleep").arg("60").spawn().expect("started");
        let (own, alive) = (std::process::id(), other.id());
        for id in [dead, own, alive] {
            fs::create_dir(place.path().join(format!("step-000001-{id}.partial"))).expect("made");
            fs::create_dir(place.path().join(format!("step-000001-{id}.old.partial"))).expect("made");
            fs::write(place.path().join(format!("state-{id}.partial")), "").expect("written");
        }
        fs::write(place.path().join("mine.partial"), "").expect("written");
        // killed between stepping aside and being replaced
        fs::create_dir(place.path().join(format!("step-000002-{dead}.old.partial"))).expect("made");
        fs::create_dir(place.path().join("step-000001")).expect("made");
        let left = || {
            let entries = fs::read_dir(place.path()).expect("there");
            let mut names: Vec<_> =
                entries.map(|entry| entry.expect("read").file_name().to_string_lossy().into_owned()).collect();
            names.sort_unstable();
            names
        };
        let left_alone = [
            "mine.partial".into(),
            format!("state-{alive}.partial"),
            "step-000001".into(),
            format!("step-000001-{alive}.old.partial"),
            format!("step-000001-{alive}.partial"),
            "step-000002".into(),
        ];
        // those of another name stay
        remove_leftovers(&place.path().join("step-000001"));
        assert_eq!(left().len(), 10);
        remove_partials(place.path());
        other.kill().expect("killed");
        other.wait().expect("ended");
        assert_eq!(left(), left_alone);
    }

    #[test]
    fn a_disk_without_room_is_known_before() {
        let place = tempfile::tempdir().expect("a folder");
        let target = place.path().join("not/yet/there");
        check_space(&target, 1).expect("a byte has room");
        #[cfg(unix)]
        {
            let error = check_space(&target, usize::MAX).expect_err("nothing has so much room").to_string();
            assert!(error.contains("there takes") && error.contains("free where it is to be"), "{error}");
        }
    }
}

"""The memory that a process may use is the least of the machine's and of every cgroup above it."""

from __future__ import annotations

from pathlib import Path

from flexbatch.memory.main_memory import available_memory, cgroup_limits, memory_limit, peak_resident_bytes

KIB = 1024
GIB = 1 << 30


def make_tree(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A made-up `/` of a machine with 8 GiB, 6 of them available."""
    files = {
        "proc/meminfo": f"MemTotal: {8 * GIB // KIB} kB\nMemAvailable: {6 * GIB // KIB} kB\nHugePages_Total: 0\n",
        "proc/self/cgroup": cgroup,
        **files,
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_without_a_limit_the_machines_memory_counts(tmp_path: Path) -> None:
    root = make_tree(tmp_path, "0::/\n", {"sys/fs/cgroup/memory.stat": "anon 5\n"})
    assert memory_limit(root) == 8 * GIB
    assert available_memory(root) == 6 * GIB
    assert cgroup_limits(root) == ()


def test_a_machine_without_cgroups_is_read_all_the_same(tmp_path: Path) -> None:
    root = make_tree(tmp_path, "", {})
    (root / "proc/self/cgroup").unlink()
    assert available_memory(root) == 6 * GIB


def test_cgroup_v2_counts_what_is_left_and_not_the_cached_pages(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/user.slice/job"
    root = make_tree(
        tmp_path,
        "0::/user.slice/job\n",
        {
            f"{group}/memory.max": f"{3 * GIB}\n",
            f"{group}/memory.high": "max\n",
            f"{group}/memory.current": f"{2 * GIB}\n",
            f"{group}/memory.stat": f"anon 1\ninactive_file {GIB}\nactive_file {GIB // 2}\nfile_mapped {GIB // 4}\n",
        },
    )
    assert memory_limit(root) == 3 * GIB
    assert available_memory(root) == GIB + GIB + GIB // 2 - GIB // 4


def test_the_limit_of_a_group_further_up_counts_as_well(tmp_path: Path) -> None:
    root = make_tree(
        tmp_path,
        "0::/outer/inner\n",
        {
            "sys/fs/cgroup/outer/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/outer/memory.current": f"{GIB // 2}\n",
            "sys/fs/cgroup/outer/inner/memory.max": "max\n",
            "sys/fs/cgroup/outer/inner/memory.current": f"{GIB // 4}\n",
        },
    )
    assert memory_limit(root) == 2 * GIB
    assert available_memory(root) == GIB + GIB // 2


def test_cgroup_v1_is_read_beside_a_v2_mount_without_memory(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/job"
    root = make_tree(
        tmp_path,
        "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n",
        {
            f"{group}/memory.limit_in_bytes": f"{4 * GIB}\n",
            f"{group}/memory.usage_in_bytes": f"{3 * GIB}\n",
            f"{group}/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\ntotal_active_file 0\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
        },
    )
    assert memory_limit(root) == 4 * GIB
    assert available_memory(root) == 2 * GIB


def test_a_container_that_shows_the_hosts_path_is_limited_by_its_mount(tmp_path: Path) -> None:
    root = make_tree(
        tmp_path,
        "4:memory:/docker/0123\n",
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{2 * GIB}\n",
        },
    )
    assert memory_limit(root) == GIB
    assert available_memory(root) == 0


def test_this_machine_gives_sensible_figures() -> None:
    assert 0 < available_memory() <= memory_limit()
    assert 1 << 20 < peak_resident_bytes() < memory_limit()

"""lensmesh.registry.v1.JobService over the table of jobs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from lensmesh.events.v1 import events_pb2
from lensmesh.registry.v1 import jobs_pb2 as pb
from lensmesh.registry.v1 import jobs_pb2_grpc

from services.kit.jobs import Job, JobStore
from services.registry.listing import Listed
from services.registry.operations.registry import Registry
from services.registry.operations.running import settle_abandoned
from services.registry.operations.switching import tell_places
from services.registry.servicer.calls import page, page_fields
from services.registry.servicer.events import Feeds
from services.registry.wire import to_dict, to_message


class JobServicer(jobs_pb2_grpc.JobServiceServicer):
    """Jobs of all services."""

    def __init__(self, registry: Registry, jobs: JobStore, feeds: Feeds) -> None:
        self._registry = registry
        self._jobs = jobs
        self._feeds = feeds

    async def GetJob(self, request: pb.GetJobRequest, context: Any) -> pb.Job:
        """One job."""
        return job_message(await self._jobs.get(request.id))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Any) -> pb.ListJobsResponse:
        """Jobs, newest first."""
        wanted, status = page(request), to_dict(request)["status"]
        rows, total = await self._jobs.list(
            kinds=[request.kind] if request.kind else None,
            states=[status] if status else None,
            resource_id=request.resource_id or None,
            after=wanted.after,
            limit=wanted.limit + 1,
            offset=wanted.offset,
        )
        listed = Listed.of(rows, total, wanted)
        return pb.ListJobsResponse(jobs=[job_message(job) for job in listed.rows], **page_fields(listed))

    async def CancelJob(self, request: pb.CancelJobRequest, context: Any) -> pb.Job:
        """Stop a job; what had not begun gives its place back at once."""
        job = await self._jobs.request_cancel(request.id)
        await settle_abandoned(self._registry)
        return await self._placed(job)

    async def RetryJob(self, request: pb.RetryJobRequest, context: Any) -> pb.Job:
        """Queue a job again."""
        return await self._placed(await self._jobs.retry(request.id))

    async def _placed(self, job: Job) -> pb.Job:
        if job.event_prefix == "switch":
            await tell_places(self._registry, job.payload["host_id"])
        return job_message(job)

    async def WatchJob(self, request: pb.WatchJobRequest, context: Any) -> AsyncIterator[events_pb2.Event]:
        """A snapshot, then the job's events up to its end."""
        job = await self._jobs.get(request.id)
        async for event in self._feeds.of_job(job, job_message(job), request.after_sequence):
            yield event


def job_message(job: Job) -> pb.Job:
    """A job as clients see it."""
    return to_message(pb.Job, job, status=job.state)

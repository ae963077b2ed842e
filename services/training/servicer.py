"""lensmesh.training.v1.TrainingService: proto in, proto out."""

from __future__ import annotations

from typing import Any

from google.protobuf import empty_pb2
from lensmesh.common.v1 import types_pb2
from lensmesh.training.v1 import training_pb2 as pb
from lensmesh.training.v1 import training_pb2_grpc

from services.kit.idempotency import request_key
from services.training import messages
from services.training.operations import Operations

_SERVICE = "lensmesh.training.v1.TrainingService"


class TrainingServicer(training_pb2_grpc.TrainingServiceServicer):
    """Trainings, and the transcoders they make."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    async def CreateTrainingJob(self, request: pb.CreateTrainingJobRequest, context: Any) -> pb.TrainingJob:
        """Queue a training, or say what it would be."""
        key = request_key(f"{_SERVICE}/CreateTrainingJob", request)
        wanted = messages.wanted(request)
        return messages.training(await self._operations.create(wanted, key, validate_only=request.validate_only))

    async def GetTrainingJob(self, request: pb.GetTrainingJobRequest, context: Any) -> pb.TrainingJob:
        """One training."""
        return messages.training(await self._operations.training(request.id))

    async def ListTrainingJobs(self, request: pb.ListTrainingJobsRequest, context: Any) -> pb.ListTrainingJobsResponse:
        """Trainings, newest first."""
        return messages.training_page(await self._operations.trainings(messages.trainings_wanted(request)))

    async def GetTrainingMetrics(self, request: pb.GetTrainingMetricsRequest, context: Any) -> pb.TrainingMetrics:
        """History of a training."""
        return messages.metrics(request.id, await self._operations.history(request.id, request.points))

    async def CancelTrainingJob(self, request: pb.CancelTrainingJobRequest, context: Any) -> pb.TrainingJob:
        """Stop a training for good."""
        return messages.training(await self._operations.cancel(request.id))

    async def PauseTrainingJob(self, request: pb.PauseTrainingJobRequest, context: Any) -> pb.TrainingJob:
        """Stop a training for now."""
        return messages.training(await self._operations.pause(request.id))

    async def ResumeTrainingJob(self, request: pb.ResumeTrainingJobRequest, context: Any) -> pb.TrainingJob:
        """Let a paused training go on."""
        return messages.training(await self._operations.resume(request.id))

    async def FinalizeTrainingJob(self, request: pb.FinalizeTrainingJobRequest, context: Any) -> pb.TrainingJob:
        """Make transcoders of a checkpoint."""
        return messages.training(await self._operations.finalize(request.id, request.checkpoint))

    async def PruneCheckpoints(self, request: pb.PruneCheckpointsRequest, context: Any) -> pb.PruneCheckpointsResponse:
        """Delete checkpoints that a policy does not keep, or say which."""
        retention = messages.retention(request)
        return messages.pruning(
            await self._operations.prune(request.id, retention, validate_only=request.validate_only)
        )

    async def GetTrainingConfig(
        self, request: pb.GetTrainingConfigRequest, context: Any
    ) -> pb.CreateTrainingJobRequest:
        """The configuration as a request."""
        return messages.wanted_message(await self._operations.config(request.id))

    async def CloneTrainingJob(self, request: pb.CloneTrainingJobRequest, context: Any) -> pb.TrainingJob:
        """Queue the same training once more."""
        key = request_key(f"{_SERVICE}/CloneTrainingJob", request)
        return messages.training(await self._operations.clone(request.id, key, validate_only=request.validate_only))

    async def GetTranscoder(self, request: pb.GetTranscoderRequest, context: Any) -> pb.Transcoder:
        """One transcoder."""
        return messages.transcoder(await self._operations.transcoder(request.id))

    async def ListTranscoders(self, request: pb.ListTranscodersRequest, context: Any) -> pb.ListTranscodersResponse:
        """Transcoders, newest first."""
        return messages.transcoder_page(await self._operations.transcoders(messages.transcoders_wanted(request)))

    async def DeleteTranscoder(self, request: pb.DeleteTranscoderRequest, context: Any) -> empty_pb2.Empty:
        """Delete a transcoder."""
        await self._operations.delete_transcoder(request.id)
        return empty_pb2.Empty()

    async def EvaluateTranscoder(self, request: pb.EvaluateTranscoderRequest, context: Any) -> pb.QueuedJob:
        """Queue an evaluation."""
        key = request_key(f"{_SERVICE}/EvaluateTranscoder", request)
        wanted = messages.wanted_evaluation(request, request.id, request.samples_per_feature)
        queued = await self._operations.evaluate(wanted, key)
        return pb.QueuedJob(job_id=queued.job_id, resource_id=queued.resource_id)

    async def ListEvaluations(self, request: pb.ListEvaluationsRequest, context: Any) -> pb.ListEvaluationsResponse:
        """Evaluations of a transcoder, newest first."""
        return messages.evaluation_page(await self._operations.evaluations(messages.evaluations_wanted(request)))

    async def EncodeText(self, request: pb.EncodeTextRequest, context: Any) -> types_pb2.LensReading:
        """Features of a text, per token."""
        token_ids = tuple(request.token_ids)
        return await self._operations.encode(request.id, request.text, token_ids, request.top_k, request.prefix)

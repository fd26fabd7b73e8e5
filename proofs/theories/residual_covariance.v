(** What a linear map of the block output cannot recover: the same for both parts

    A block output is the sum of a skip part x and an MLP part y.  Over T tokens,
    stacked as columns of X and Y, a steer at block_out reads H, from which the sum
    can be recovered linearly, X + Y = E H:
      linear steer   H = X + Y,               E = 1
      affine steer   H = X + Y with a row of ones below,   E = [1 0].

    Let B and C be any least-squares maps from H to Y and from H to X, and
    Σ_y = (Y - B H)(Y - B H)^T,  Σ_x = (X - C H)(X - C H)^T  (T times the residual
    covariances).

    Claims.
      - Σ_x = Σ_y: the part of x that h does not determine is minus that of y.
      - The best replacement at block_out of a linear steer A y at mlp_out is A B h:
        for every S,  ||A Y - S H||^2 >= ||A Y - A B H||^2 = tr(A Σ_y A^T),
        and rank(A B) <= rank(A).

    Assumptions.  Any ordered field.  No inverse or pseudo-inverse of the covariance
    of h is used, so it may be singular.

    Not said here.  These are the moments of the tokens used for the fit; on new
    tokens the error is larger, and the gap depends on how many were used. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics frobenius least_squares.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section ResidualCovariance.
Variables (R : realFieldType) (d k T : nat).
Variables (X Y : 'M[R]_(d, T)) (H : 'M[R]_(k, T)) (E : 'M[R]_(d, k)).
Hypothesis sum_read : X + Y = E *m H.

(** (Y - B H)(Y - B H)^T: T times the covariance of what B H leaves of Y. *)
Definition residual_cov (Z : 'M[R]_(d, T)) (B : 'M[R]_(d, k)) : 'M[R]_d :=
  (Z - B *m H) *m (Z - B *m H)^T.

(** What E - B leaves of X is minus what B leaves of Y. *)
Lemma misfits_opposite B : X - (E - B) *m H = - (Y - B *m H).
Proof. by rewrite mulmxBl -sum_read !opprB opprD addrCA addNKr. Qed.

(** If B is a least-squares map to Y then E - B is one to X. *)
Lemma least_squares_skip B : least_squares H Y B -> least_squares H X (E - B).
Proof. by rewrite /least_squares misfits_opposite mulNmx => ->; rewrite oppr0. Qed.

(** Σ_x = Σ_y, for any two least-squares maps. *)
Theorem residual_cov_equal B C :
  least_squares H Y B -> least_squares H X C -> residual_cov X C = residual_cov Y B.
Proof.
move=> lsB lsC; rewrite /residual_cov.
rewrite (least_squares_unique lsC (least_squares_skip lsB)) misfits_opposite.
by rewrite linearN mulNmx mulmxN opprK.
Qed.

(** tr(A Σ_y A^T) is the squared misfit of A B H to A Y. *)
Lemma residual_cov_trace (A B : 'M[R]_(d, _)) :
  frob (A *m Y - A *m B *m H) = \tr (A *m residual_cov Y B *m A^T).
Proof. by rewrite -mulmxA -mulmxBr -frob_tr /frob trmxK trmx_mul !mulmxA. Qed.

(** The best replacement of A y is A B h, of no larger rank. *)
Theorem best_replication (A : 'M[R]_d) B : least_squares H Y B ->
  [/\ (\rank (A *m B) <= \rank A)%N,
      frob (A *m Y - A *m B *m H) = \tr (A *m residual_cov Y B *m A^T)
    & forall S, frob (A *m Y - A *m B *m H) <= frob (A *m Y - S *m H)].
Proof.
move=> lsB; split=> [||S]; [exact: mxrankM_maxl|exact: residual_cov_trace|].
have lsAB : least_squares H (A *m Y) (A *m B).
  by rewrite /least_squares -mulmxA -mulmxBr -mulmxA [_ *m H^T]lsB mulmx0.
by rewrite [X in _ <= X](least_squares_split lsAB S) le_addl frob_ge0.
Qed.
End ResidualCovariance.

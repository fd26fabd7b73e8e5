(** Updates that change the weights and not the model

    Claims, exact.
      - Scaling hidden unit j of W_u by c_j and of W_d by 1/c_j leaves a gated MLP the
        same function, for any activation.
      - Replacing (W_o, W_v) of a head by (W_o N', N W_v) with N' N = 1 leaves the head
        the same.

    So the size of an update gives no lower bound on the size of its shift.

    Assumptions.  None: any commutative ring. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics glu_expansion glu_exactness.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory.
Local Open Scope ring_scope.

Section NullUpdates.
Variables (R : comRingType) (d n o k T : nat).

(** W_u -> diag(c) W_u, W_d -> W_d diag(c'), with c_j c'_j = 1. *)
Theorem up_down_rescaling (phi : R -> R) (Wg Wu : 'M[R]_(n, d)) (Wd : 'M[R]_(o, n)) u
    (c c' : 'rV[R]_n) : (forall j, c' 0 j * c 0 j = 1) ->
  glu phi Wg (diag_mx c *m Wu) (Wd *m diag_mx c') u = glu phi Wg Wu Wd u.
Proof.
move=> cc'; rewrite /glu -!mulmxA; congr (_ *m _); apply/colP=> j.
rewrite mul_diag_mx mxE !hadE mul_diag_mx [X in _ * (_ * X)]mxE.
by rewrite mulrCA (mulrA (c' 0 j)) cc' mul1r.
Qed.

(** W_v -> N W_v, W_o -> W_o N', with N' N = 1. *)
Theorem value_output_rescaling (Wo : 'M[R]_(o, k)) (Wv : 'M[R]_(k, d)) (N N' : 'M[R]_k)
    (X : 'M_(d, T)) (a : 'cV_T) : N' *m N = 1%:M ->
  head (Wo *m N') (N *m Wv) X a = head Wo Wv X a.
Proof.
by move=> NN; rewrite /head -!mulmxA (mulmxA N') NN mul1mx.
Qed.
End NullUpdates.
